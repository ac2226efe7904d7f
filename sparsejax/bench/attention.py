"""What block-sparse attention costs beside what it must, and beside its peers.

    python -m sparsejax.bench attention

Batch 1, 4 heads of 64, float32, blocks of 128. Each row of ``results/attention.csv`` is
one piece of work done by everybody in turns: by us, by XLA with a dense score matrix,
by PyTorch's scaled-dot-product attention with the same mask, by its compiled
FlexAttention (which has no backward pass on a CPU), and by a plain matrix product of as
many FLOPs as the live blocks need, which nobody beats. Ratios are taken within a turn.
PyTorch is an extra: ``pip install "sparsejax[peers]"``; without it its columns stay
empty. Rows made with memory in huge pages say so, and lie beside those without.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.attention import (
    BlockMask,
    Pattern,
    block_sparse_attention,
    causal,
    sliding_window,
)
from sparsejax.bench.table import (
    PAGES,
    markdown,
    pages,
    provenance,
    read_rows,
    write_rows,
)
from sparsejax.typing import Array

HEADS, WIDTH, BLOCK = 4, 64, 128
PRODUCT = 1024  # width of the square matrix product that tells the machine's rate
DENSE_LIMIT = {"forward": 16384, "forward + backward": 8192}  # longer needs too much
COLUMNS = {
    "work": "work",
    "length": "length",
    "pass": "pass",
    "density": "live blocks",
    "ours_ms": "ours, ms",
    "limit_ratio": "of the limit",
    "dense_ratio": "times dense XLA",
    "sdpa_ratio": "times SDPA",
    "flex_ratio": "times FlexAttention",
}


class Work(NamedTuple):
    """A mask over a length, to be applied forward or forward and backward."""

    name: str
    length: int
    backward: bool
    pattern: Pattern

    @property
    def passes(self) -> str:
        """Name what is measured."""
        return "forward + backward" if self.backward else "forward"

    def mask(self) -> BlockMask:
        """Build the pattern's blocks."""
        size = {"q_len": self.length, "kv_len": self.length}
        return BlockMask.from_pattern(
            self.pattern, **size, block_q=BLOCK, block_kv=BLOCK
        )

    def flops(self) -> float:
        """Multiply-adds of the live blocks, twice: two products, five more backward."""
        live = float(self.mask().count.sum()) * BLOCK * BLOCK
        return 2 * (7 if self.backward else 2) * live * HEADS * WIDTH

    def inputs(self) -> tuple[Array, Array, Array]:
        """Draw queries, keys and values."""
        keys = jax.random.split(jax.random.key(self.length), 3)
        shape = (1, self.length, HEADS, WIDTH)
        q, k, v = (jax.random.normal(key, shape) for key in keys)
        return q, k, v


def race(
    runners: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Let everybody run in turns, twice: the second time counts.

    The first finds memory and caches as another has left them. After one that gives
    back a gigabyte, others take up to four times as long, once.

    Args:
        rounds: at most so many, and no new one after ``seconds``, but two.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()  # and some compile
    began = time.perf_counter()
    for number in range(rounds):
        for name, run in runners.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if number and time.perf_counter() - began > seconds:
            break
    return times


def compiled(attend: Callable[..., Array], work: Work) -> Any:
    """Compile one implementation for a piece of work."""
    function = attend
    if work.backward:
        function = jax.grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2))
    return jax.jit(function).lower(*work.inputs()).compile()


def jax_runner(attend: Callable[..., Array], work: Work) -> Callable[[], Any]:
    """Give one implementation, compiled, on a piece of work's own inputs."""
    run, inputs = compiled(attend, work), work.inputs()
    return lambda: jax.block_until_ready(run(*inputs))


def ours(mask: BlockMask) -> Callable[..., Array]:
    """Our attention under a mask."""
    return functools.partial(block_sparse_attention, mask=mask)


def dense(pattern: Pattern, length: int) -> Callable[..., Array]:
    """Attention as JAX has it, under the pattern written out element by element."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        at = jnp.arange(length, dtype="int32")
        visible = pattern(at[:, None], at[None])[None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=visible, implementation="xla")

    return attend


def product_runner(flops: float) -> Callable[[], Any]:
    """Do as many FLOPs in plain square matrix products, at least one."""
    count = max(1, round(flops / (2 * PRODUCT**3)))
    x = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT)) / PRODUCT**0.5

    @jax.jit
    def run(x: Array) -> Array:
        return jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)

    return lambda: jax.block_until_ready(run(x))


def runners(work: Work) -> dict[str, Callable[[], Any]]:
    """Everybody who can do a piece of work on this machine."""
    found = {
        "ours": jax_runner(ours(work.mask()), work),
        "limit": product_runner(work.flops()),
    }
    if work.length <= DENSE_LIMIT[work.passes]:
        found["dense"] = jax_runner(dense(work.pattern, work.length), work)
    try:
        from sparsejax.bench import peers  # noqa: PLC0415  PyTorch is an extra
    except ModuleNotFoundError:
        return found
    arrays, size = work.inputs(), {"length": work.length, "backward": work.backward}
    if "dense" in found:
        found["sdpa"] = peers.sdpa(arrays, work.pattern, **size)
    if not work.backward:
        found["flex"] = peers.flex(arrays, work.pattern, length=work.length)
    return found


def row(work: Work, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure one piece of work; a ratio above 1 says by how much we are faster."""
    times = race(runners(work), rounds=rounds, seconds=seconds)
    found: dict[str, Any] = {
        "work": work.name,
        "length": work.length,
        "pass": work.passes,
        "density": f"{work.mask().density():.3f}",
    }
    for name in ("ours", "limit", "dense", "sdpa", "flex"):
        known = name in times
        median = statistics.median(times[name]) * 1e3 if known else None
        found[f"{name}_ms"] = f"{median:.2f}" if known else ""
        found[f"{name}_ratio"] = f"{ratio(times, name, 'ours'):.3g}" if known else ""
    return found | {"rounds": len(times["ours"])}


def ratio(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over the turns of one's time over the other's."""
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def peak(work: Work) -> int:
    """Bytes that XLA sets aside for a piece of work besides its inputs and outputs."""
    analysis = compiled(ours(work.mask()), work).memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def proportion(length: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Time 16 and 4 blocks a row in turns: how does time follow live blocks?"""
    # A position more than whole blocks, or rows would see one block more.
    few, many = (
        Work("", length, True, sliding_window((blocks - 1) * BLOCK + 1))
        for blocks in (4, 16)
    )
    runners = {
        name: jax_runner(ours(work.mask()), work)
        for name, work in (("few", few), ("many", many))
    }
    times = race(runners, rounds=rounds, seconds=seconds)
    return {
        "work": "16 over 4 blocks a row",
        "length": length,
        "pass": few.passes,
        "density": f"{many.mask().density() / few.mask().density():.2f} times",
        "ours_ms": f"{ratio(times, 'many', 'few'):.2f} times",
        "rounds": len(times["few"]),
    }


def works(lengths: list[int]) -> list[Work]:
    """Windows of 4 blocks at all lengths, of 16 at the middle, and plain causal."""
    window, middle = sliding_window(4 * BLOCK), lengths[len(lengths) // 2]
    wide = sliding_window(16 * BLOCK)
    both = (False, True)
    found = [Work("window of 4 blocks", n, b, window) for n in lengths for b in both]
    found += [Work("window of 16 blocks", middle, b, wide) for b in both]
    return found + [Work("causal", middle, b, causal()) for b in both]


def main(argv: list[str]) -> int:
    """Measure everything, write the table and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench attention")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    flags = parser.parse_args(argv)
    pace = {"rounds": flags.rounds, "seconds": flags.seconds}
    about, ending, rows = provenance(), pages(), []
    others = read_rows("attention")  # those with the other pages stay
    others = [x for x in others if x["work"].endswith(PAGES) != bool(ending)]
    for work in works(sorted(flags.lengths)):
        measured = row(work, **pace)
        measured["work"] += ending
        rows.append(measured | {"peak_mib": "", **about})
        if work.backward:
            rows[-1]["peak_mib"] = f"{peak(work) / 2**20:.1f}"
        sys.stderr.write(f"{work.name}, {work.length}, {work.passes}\n")
        write_rows("attention", [*others, *rows])
    middle = sorted(flags.lengths)[len(flags.lengths) // 2]
    rows.append(dict.fromkeys(rows[0], "") | proportion(middle, **pace) | about)
    rows[-1]["work"] += ending
    write_rows("attention", [*others, *rows])
    sys.stdout.write(markdown(rows, COLUMNS | {"peak_mib": "peak MiB"}) + "\n")
    return 0
