"""What block-sparse attention costs on a Hopper GPU, beside FlexAttention and cuBLAS.

    python -m sparsejax.bench attention_gpu

16 heads of 128, bfloat16, blocks of 128, 65536 tokens in sequences of several lengths,
self-attention under causal masks of several densities: windows with sinks, and blocks
drawn at random for each head, as a selector would choose them. Each row of
``results/attention_gpu.csv`` is one piece of work done in turns by us and by PyTorch's
compiled FlexAttention under the same mask. Rates count the products of the live blocks
alone: two forward, five more backward. The limit is the rate of a dense matrix product
in the same run.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention import BlockMask, block_sparse_attention, causal
from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.typing import Array

HEADS, WIDTH, BLOCK, TOKENS = 16, 128, 128, 65536
PRODUCT = 8192
COLUMNS = {
    "work": "work",
    "length": "length",
    "pass": "pass",
    "density": "live blocks",
    "ours_ms": "ours, ms",
    "tflops": "TFLOP/s",
    "limit_share": "of the dense rate",
    "flex_ratio": "times FlexAttention",
}


def _triangle(n: int, density: float) -> np.ndarray:
    del density  # half of the square, and the diagonal
    i, j = np.ogrid[:n, :n]
    return (i >= j)[None]


def _window(n: int, density: float) -> np.ndarray:
    i, j = np.ogrid[:n, :n]
    wanted = max(1, round(density * n))  # blocks a row, on average
    # A window of w blocks and one of sinks: (w + 1) n - w^2 / 2 blocks live.
    w = round(n - np.sqrt(max(n * n - 2 * n * wanted, 0)))
    return ((i >= j) & ((i - j < w) | (j == 0)))[None]


def _chosen(n: int, density: float) -> np.ndarray:
    i, j = np.ogrid[:n, :n]
    scores = np.random.default_rng(0).random((HEADS, n, n))
    scores = np.where(i == j, 2, np.where(i > j, scores, -1))
    share = np.minimum(1, 2 * density)  # of what a row may read
    return scores > 1 - share


LIVE = {"causal": _triangle, "window": _window, "chosen": _chosen}


class Work(NamedTuple):
    """Which blocks of a causal square each head reads, and what is measured."""

    kind: str  # a key of LIVE
    length: int
    density: float  # of the square, about
    backward: bool

    @property
    def batch(self) -> int:
        """How many sequences make up the tokens."""
        return TOKENS // self.length

    @property
    def passes(self) -> str:
        """Name what is measured."""
        return "forward + backward" if self.backward else "forward"

    def live(self) -> np.ndarray:
        """Draw the live blocks, "h i j"; every query block reads its own."""
        return LIVE[self.kind](self.length // BLOCK, self.density)

    def mask(self) -> BlockMask:
        """Build the blocks' mask; the diagonal ones are causal inside."""
        live = self.live()
        # As wide for every density: one compilation serves them all.
        ids = np.argsort(~live, axis=2, kind="stable")[None]
        return BlockMask.from_blocks(
            jnp.asarray(ids, "int32"),
            jnp.asarray(live.sum(2), "int32")[None],
            q_len=self.length,
            kv_len=self.length,
            block_q=BLOCK,
            block_kv=BLOCK,
            pattern=causal(),
        )

    def flops(self) -> float:
        """Multiply-adds of the live blocks, twice."""
        live = self.live()
        blocks = live.sum() * (HEADS // live.shape[0]) * self.batch
        products = 7 if self.backward else 2
        return 2.0 * products * blocks * BLOCK * BLOCK * WIDTH

    def inputs(self) -> tuple[Array, ...]:
        """Draw queries, keys, values and the gradient of the result."""
        keys = jax.random.split(jax.random.key(self.length), 4)
        shape = (self.batch, self.length, HEADS, WIDTH)
        return tuple(jax.random.normal(key, shape, "bfloat16") for key in keys)


_forward = jax.jit(
    functools.partial(block_sparse_attention, implementation="mosaic_gpu")
)


@jax.jit
def _both(q: Array, k: Array, v: Array, do: Array, mask: BlockMask) -> Any:
    return jax.vjp(lambda *x: _forward(*x, mask), q, k, v)[1](do)


def ours(work: Work) -> Callable[[], Any]:
    """Give our kernels on a piece of work's own inputs."""
    mask, (q, k, v, do) = work.mask(), work.inputs()
    if work.backward:
        return lambda: _both(q, k, v, do, mask)
    return lambda: _forward(q, k, v, mask)


def product() -> Callable[[], Any]:
    """Give a dense matrix product of random numbers."""
    a, b = jax.random.normal(jax.random.key(0), (2, PRODUCT, PRODUCT), "bfloat16")
    run = jax.jit(jnp.matmul)
    return lambda: run(a, b)


def seconds(
    run: Callable[[], Any], wait: Callable[[Any], Any], *, batch: float = 0.03
) -> float:
    """Time one call, from a queue of calls that keeps the device busy."""
    start = time.perf_counter()
    wait(run())
    calls = max(3, round(batch / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    wait(run())
    return (time.perf_counter() - start) / calls


def row(work: Work, *, rounds: int) -> dict[str, Any]:
    """Measure one piece of work; a ratio above 1 says by how much we are faster."""
    try:
        from sparsejax.bench import peers  # noqa: PLC0415  PyTorch is an extra
    except ModuleNotFoundError:
        peers = None
    runners: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "ours": (ours(work), jax.block_until_ready),
        "limit": (product(), jax.block_until_ready),
    }
    if peers:
        size = {"live": work.live(), "block": BLOCK, "backward": work.backward}
        runners["flex"] = peers.flex_on_gpu(work.inputs(), **size), peers.wait
    for run, wait in runners.values():
        wait(run())
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, (run, wait) in runners.items():
            times[name].append(seconds(run, wait))
    median = {name: statistics.median(x) for name, x in times.items()}
    rate = work.flops() / median["ours"]
    limit = 2 * PRODUCT**3 / median["limit"]
    found = {
        "work": work.kind,
        "length": work.length,
        "pass": work.passes,
        "density": f"{work.live().mean():.3f}",
        "ours_ms": f"{median['ours'] * 1e3:.3f}",
        "tflops": f"{rate / 1e12:.0f}",
        "limit_share": f"{rate / limit:.3f}",
        "flex_ms": "",
        "flex_ratio": "",
        "limit_tflops": f"{limit / 1e12:.0f}",
        "rounds": rounds,
    }
    if "flex" in median:
        ratios = [b / a for a, b in zip(times["ours"], times["flex"], strict=True)]
        found["flex_ms"] = f"{median['flex'] * 1e3:.3f}"
        found["flex_ratio"] = f"{statistics.median(ratios):.3g}"
    return found


def works(lengths: list[int]) -> list[Work]:
    """Causal, windows and chosen blocks, at all lengths, forward and both ways."""
    kinds = [("causal", 0.5)]
    kinds += [(k, d) for k in ("window", "chosen") for d in (0.05, 0.1, 0.25)]
    both = (False, True)
    return [Work(k, n, d, b) for n in lengths for k, d in kinds for b in both]


def main(argv: list[str]) -> int:
    """Measure everything, write the table and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench attention_gpu")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536]
    )
    parser.add_argument("--kinds", nargs="+", default=list(LIVE))
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args(argv)
    about, rows = provenance(), []
    for work in works(flags.lengths):
        if work.kind not in flags.kinds:
            continue
        rows.append(row(work, rounds=flags.rounds) | about)
        sys.stderr.write(" ".join(str(x) for x in list(rows[-1].values())[:9]) + "\n")
        write_rows("attention_gpu", rows)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
