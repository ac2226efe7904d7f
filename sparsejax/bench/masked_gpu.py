"""What products with live blocks cost on a Hopper GPU, beside dense ones.

    python -m sparsejax.bench masked_gpu

8192 rows by a bfloat16 weight, 4096 to 4096, of which a share of the blocks is live,
in turns with the dense product of the same shape. Each row of
``results/masked_gpu.csv`` is one density; ``dense_ratio`` above 1 says by how much ours
is faster, and ``break_even`` is the density where it is 1, between the two that were
measured around it, for that size of blocks and that pass. Rates count live blocks
alone: one product forward, two more backward.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.bench.attention_gpu import seconds
from sparsejax.bench.moe import PASSES
from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.masked import BlockSparse, block_sparse_matmul
from sparsejax.typing import Array

ROWS, WIDTH, BLOCKS = 8192, 4096, (64, 128)
DENSITIES = 0.5, 0.4, 0.3, 0.2, 0.1, 0.05
IMPLEMENTATION = "mosaic_gpu"
COLUMNS = {
    "block": "blocks of",
    "pass": "pass",
    "density": "density",
    "ours_ms": "ours, ms",
    "dense_ms": "dense, ms",
    "dense_ratio": "faster than dense",
    "tflops": "TFLOP/s",
    "break_even": "even at a density of",
}


def product(block: int, density: float, *, backward: bool) -> dict[str, Callable]:
    """Give our product and its dense equal, on inputs of their own; neither waits."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (ROWS, WIDTH), (WIDTH, WIDTH), (ROWS, WIDTH)
    pairs = zip(keys, shapes, strict=True)
    x, w, dy = (jax.random.normal(k, s, "bfloat16") for k, s in pairs)
    side = WIDTH // block
    order = np.random.default_rng(0).permutation(side * side).reshape(side, side)
    blocks = BlockSparse.from_dense(w, order < round(density * side * side))

    def ours(x: Array, blocks: BlockSparse) -> Array:
        return block_sparse_matmul(x, blocks, implementation=IMPLEMENTATION)

    def both(f: Callable[..., Array]) -> Callable[..., Any]:
        def run(x: Array, w: Any, dy: Array) -> Any:
            y, back = jax.vjp(f, x, w)
            return y, back(dy)

        return run

    def bound(f: Callable[..., Array], w: Any) -> Callable[[], Any]:
        run = jax.jit(both(f) if backward else f)
        given = (x, w, dy) if backward else (x, w)
        return lambda: run(*given)

    return {"ours": bound(ours, blocks), "dense": bound(jnp.matmul, w)}


def row(block: int, density: float, *, backward: bool, rounds: int) -> dict[str, Any]:
    """Measure one density, in turns."""
    runners = product(block, density, backward=backward)
    for run in runners.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _, (name, run) in itertools.product(range(rounds), runners.items()):
        times[name].append(seconds(run, jax.block_until_ready))
    median = {name: statistics.median(x) for name, x in times.items()}
    pairs = zip(times["ours"], times["dense"], strict=True)
    flops = 2.0 * ROWS * WIDTH**2 * density * (3 if backward else 1)
    return {
        "block": block,
        "pass": PASSES[backward],
        "density": density,
        "ours_ms": f"{median['ours'] * 1e3:.4f}",
        "dense_ms": f"{median['dense'] * 1e3:.4f}",
        "dense_ratio": f"{statistics.median(b / a for a, b in pairs):.3g}",
        "tflops": f"{flops / median['ours'] / 1e12:.0f}",
        "rounds": rounds,
    }


def break_even(ratios: dict[float, float]) -> str:
    """Give the density where a ratio falls to 1, on a line between two densities.

    >>> break_even({0.1: 3.0, 0.3: 1.5, 0.5: 0.5})
    '0.40'
    >>> break_even({0.1: 3.0, 0.3: 1.5}), break_even({0.1: 0.9})
    ('> 0.3', '< 0.1')
    """
    points = sorted(ratios.items())
    for (low, above), (high, below) in itertools.pairwise(points):
        if above >= 1 > below:
            return f"{low + (high - low) * (above - 1) / (above - below):.2f}"
    low, high = points[0], points[-1]
    return f"> {high[0]}" if low[1] >= 1 else f"< {low[0]}"


def main(argv: list[str]) -> int:
    """Measure everything, write the table and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench masked_gpu")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args(argv)
    about, rows = provenance(), []
    for block, backward in itertools.product(flags.blocks, (False, True)):
        pace: dict[str, Any] = {"backward": backward, "rounds": flags.rounds}
        found = [row(block, density, **pace) for density in flags.densities]
        even = break_even({r["density"]: float(r["dense_ratio"]) for r in found})
        rows += [r | {"break_even": even} | about for r in found]
        write_rows("masked_gpu", rows)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
