"""Are grouped products right and fast? ``python -m pallas_kernels.gpu.grouped_check``.

On a Hopper: first values and gradients against float32 products by definition, then
rates beside a dense product of the same shape, ``jax.lax.ragged_dot``, and tokamax and
PyTorch where they are installed. The table also goes to ``$OUT/grouped_gpu.csv``, or to
``results/``. ``--tiny`` runs small cases in the interpreter, anywhere, and times
nothing.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.grouped import rows_by_rows, rows_by_weights
from pallas_kernels.gpu.grouped_frame import Tiling
from pallas_kernels.gpu.interpreter import interpreted

__all__ = ["PRODUCTS", "SIZES", "errors", "main", "products"]

PRODUCTS = ("forward", "dx", "dw")
BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3}  # root mean square, of the result's size
# Parts of 1024 rows; what they leave is a tail.
SIZES = {
    "even": (256, 256, 256, 256),
    "skewed": (701, 13, 301, 9),
    "empty": (0, 512, 0, 512),
    "huge": (0, 0, 1024, 0),
    "tail": (77, 0, 130, 66),
    "one_row": (0, 1, 0, 0),
    "nothing": (0, 0, 0, 0),
}
CHECKED = (
    (Tiling(), "bfloat16"),
    (Tiling(columns=128, slots=6), "float16"),
    (Tiling(rows=64, slots=5, buffers=2), "bfloat16"),
)
TIMED = ((8192, 8), (8192, 64), (32768, 64), (65536, 256), (65536, 8))
WIDTH, HIDDEN = 2048, 2048
VARIED = 32768, 64  # rows and experts of the trials below
TRIALS = (
    Tiling(slots=3, buffers=4),
    Tiling(slots=5, columns=128, buffers=2),
    Tiling(panel=4),
    Tiling(panel=64),
    Tiling(rows=64, slots=5, buffers=2),
)


Timed = tuple[str, str, float]  # sizes, product, seconds


class Row(NamedTuple):
    """One line of the table."""

    device: str
    jax: str
    rows: int
    experts: int
    width: int
    hidden: int
    sizes: str
    product: str
    implementation: str
    tiling: str
    milliseconds: float
    tflops: float
    share: float  # of the dense product's rate


def products(tiling: Tiling) -> dict[str, Callable[..., jax.Array]]:
    """The three kernels, each as a function of x, w, dy and sizes."""
    by_weights = functools.partial(rows_by_weights, tiling=tiling)
    return {
        "forward": lambda x, w, _, sizes: by_weights(x, w, sizes),
        "dx": lambda _, w, dy, sizes: by_weights(dy, w, sizes, turned=True),
        "dw": lambda x, _, dy, sizes: rows_by_rows(x, dy, sizes, tiling=tiling),
    }


def operands(
    rows: int, experts: int, width: int, hidden: int, dtype: str
) -> tuple[jax.Array, ...]:
    """Random x, w and dy."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, width), (experts, width, hidden), (rows, hidden)
    pairs = zip(keys, shapes, strict=True)
    return tuple(jax.random.normal(k, s, "bfloat16").astype(dtype) for k, s in pairs)


@jax.default_matmul_precision("highest")
def expected(x: Any, w: Any, dy: Any, sizes: Any) -> dict[str, jax.Array]:
    """Products by definition, in float32."""
    x, w, dy = (a.astype("float32") for a in (x, w, dy))
    ends = jnp.cumsum(sizes)[:, None]
    n = jnp.arange(len(x))[None]
    live = ((n >= ends - sizes[:, None]) & (n < ends))[:, :, None]
    xs, dys = (jnp.where(live, a[None], 0) for a in (x, dy))
    return {
        "forward": jnp.einsum("emd,edf->mf", xs, w),
        "dx": jnp.einsum("emf,edf->md", dys, w),
        "dw": jnp.einsum("emd,emf->edf", xs, dys),
    }


def errors(
    tiling: Tiling, dtype: str, *, scale: int = 1, names: tuple[str, ...] = tuple(SIZES)
) -> Iterator[tuple[str, dict[str, float]]]:
    """Relative errors of each product, case by case; rows past the groups are NaN."""
    x, w, dy = operands(1024 // scale, 4, 512 // scale, 512 // scale, dtype)
    run = {name: jax.jit(f) for name, f in products(tiling).items()}
    slow = jax.jit(expected)
    for case in names:
        sizes = jnp.asarray(SIZES[case], "int32") // scale
        live = (jnp.arange(len(x)) < sizes.sum())[:, None]
        given = (jnp.where(live, x, jnp.nan), w, jnp.where(live, dy, jnp.nan), sizes)
        right = slow(*given)
        found = {name: f(*given).astype("float32") for name, f in run.items()}
        yield case, {name: _error(found[name], right[name]) for name in PRODUCTS}


def _error(found: jax.Array, right: jax.Array) -> float:
    """Root mean square error by size; infinite where 0 is not exactly 0."""
    size = jnp.sqrt(jnp.square(right).mean())
    rows = (right != 0).any(-1, keepdims=True)
    wrong = (jnp.where(rows, 0, found) != 0).any()
    error = jnp.sqrt(jnp.square(found - right).mean()) / jnp.maximum(size, 1e-30)
    return float(jnp.where(wrong, jnp.inf, error))


def seconds(f: Callable[[], Any], *, calls: int = 20) -> float:
    """Median time of a call, from batches of calls."""
    jax.block_until_ready(f())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([f() for _ in range(calls)][-1])
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def group_sizes(rows: int, experts: int, kind: str) -> jax.Array:
    """All rows in equal groups, or by a power law in a random order."""
    if kind == "even":
        return jnp.full(experts, rows // experts, "int32")
    rng = np.random.default_rng(0)
    parts = rng.permutation(1 / np.arange(1, experts + 1))
    ends = np.round(np.cumsum(parts) / parts.sum() * rows).astype("int32")
    return jnp.asarray(np.diff(ends, prepend=np.int32(0)))


def dense() -> dict[str, Callable[..., jax.Array]]:
    """Products of the same shape with one weight."""
    return {
        "forward": lambda x, w, _, __: x @ w[0],
        "dx": lambda _, w, dy, __: dy @ w[0].T,
        "dw": lambda x, _, dy, __: x.T @ dy,
    }


def ragged(dot: Callable[..., Any]) -> dict[str, Callable[..., jax.Array]]:
    """An operation like ``jax.lax.ragged_dot``, and its gradients."""

    def back(x: Any, w: Any, dy: Any, sizes: Any) -> Any:
        return jax.vjp(lambda x, w: dot(x, w, sizes), x, w)[1](dy)

    return {
        "forward": lambda x, w, _, sizes: dot(x, w, sizes),
        "dx": lambda *given: back(*given)[0],
        "dw": lambda *given: back(*given)[1],
    }


def tokamax_rates(given: tuple, sizes: dict[str, jax.Array]) -> Iterator[Timed]:
    """Seconds of tokamax's grouped product."""
    tokamax: Any = importlib.import_module("tokamax")
    for name, f in ragged(tokamax.ragged_dot).items():
        run = jax.jit(f)
        for kind, count in sizes.items():
            yield kind, name, seconds(functools.partial(run, *given, count))


def torch_rates(given: tuple, sizes: dict[str, jax.Array]) -> Iterator[Timed]:
    """Seconds of PyTorch's grouped product."""
    torch: Any = importlib.import_module("torch")
    shapes = [x.shape for x in given]
    x, w, dy = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    for kind, count in sizes.items():
        offs = torch.tensor(np.cumsum(np.asarray(count), dtype="int32"), device="cuda")
        run = {
            "forward": lambda offs=offs: torch._grouped_mm(x, w, offs=offs),
            "dx": lambda offs=offs: torch._grouped_mm(dy, w.mT, offs=offs),
            "dw": lambda offs=offs: torch._grouped_mm(x.mT, dy, offs=offs),
        }
        for name, f in run.items():
            times = []
            for _ in range(6):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(20):
                    f()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) / 20)
            yield kind, name, statistics.median(times[1:])


PEERS = {"tokamax": tokamax_rates, "torch": torch_rates}


def trials(case: tuple[int, int]) -> dict[tuple[str, Tiling | None], dict]:
    """What to time on a case: by name and tiling, the products."""
    found: dict[tuple[str, Tiling | None], dict] = {("matmul", None): dense()}
    found["pallas", Tiling()] = products(Tiling())
    if case == VARIED:
        found |= {("pallas", t): products(t) for t in TRIALS}
    if case == TIMED[0]:
        found["ragged_dot", None] = ragged(jax.lax.ragged_dot)
    return found


def rates(case: tuple[int, int]) -> Iterator[Row]:
    """Time everything on one case."""
    rows, experts = case
    given = operands(rows, experts, WIDTH, HIDDEN, "bfloat16")
    kinds = ("even", "skewed")
    sizes = {kind: group_sizes(rows, experts, kind) for kind in kinds}
    plan = [(*key, name, f) for key, x in trials(case).items() for name, f in x.items()]
    lowered = [jax.jit(f).lower(*given, sizes["even"]) for *_, f in plan]
    with ThreadPoolExecutor(8) as pool:
        ready = list(pool.map(lambda x: x.compile(), lowered))
    flops, best = 2 * rows * WIDTH * HIDDEN, {}
    about = jax.devices()[0].device_kind, jax.__version__, *case, WIDTH, HIDDEN

    def line(kind: str, name: str, took: float, who: str, tiling: str = "") -> Row:
        best.setdefault(name, took)  # the dense product comes first
        rate, share = round(flops / took / 1e12, 1), round(best[name] / took, 3)
        took = round(took * 1e3, 4)
        return Row(*about, kind, name, who, tiling, took, rate, share)

    for (who, tiling, name, _), f in zip(plan, ready, strict=True):
        for kind in kinds[:1] if who == "matmul" else kinds:
            took = seconds(functools.partial(f, *given, sizes[kind]))
            yield line(kind, name, took, who, _text(tiling))
    for who, measure in PEERS.items():
        try:
            yield from (line(*found, who=who) for found in measure(given, sizes))
        except (ImportError, AttributeError, RuntimeError) as why:
            print(who, "left out:", why)  # noqa: T201


def _text(tiling: Tiling | None) -> str:
    if tiling is None:
        return ""
    t = tiling
    return f"{t.rows}x{t.columns} slots {t.slots} buffers {t.buffers} panel {t.panel}"


def main(args: list[str] | None = None) -> None:
    """Print errors and rates, and raise if an error is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=90, help="no case starts late")
    given = parser.parse_args(args)
    start, wrong = time.perf_counter(), []
    tiny = Tiling(columns=64, slots=2, programs=2)
    for tiling, dtype in ((tiny, "bfloat16"),) if given.tiny else CHECKED:
        options = {"scale": 4, "names": ("tail",)} if given.tiny else {}
        with interpreted() if given.tiny else contextlib.nullcontext():
            for case, found in errors(tiling, dtype, **options):
                words = {k: f"{e:.1e}" for k, e in found.items()}
                print(case, dtype, _text(tiling), words, flush=True)  # noqa: T201
                wrong += [case] * (not max(found.values()) < BOUNDS[dtype])
    if not given.tiny:
        folder = Path(os.environ.get("OUT", "results"))
        folder.mkdir(exist_ok=True, parents=True)
        with (folder / "grouped_gpu.csv").open("w") as file:
            table = csv.writer(file)
            table.writerow(Row._fields)
            for case in TIMED:
                if time.perf_counter() - start > given.seconds:
                    print(case, "left out: late")  # noqa: T201
                    continue
                for row in rates(case):
                    table.writerow(row)
                    file.flush()
                    print(*row[2:], flush=True)  # noqa: T201
    if wrong:
        raise SystemExit(f"too far from float32 products: {wrong}")


if __name__ == "__main__":
    main()
