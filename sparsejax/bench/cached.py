"""What one more token costs a layer of attention, behind so many that are cached.

    python -m sparsejax.bench cached

Batch 1, 8 heads of 64 with 2 key heads, float32, blocks of 128, budgets of the papers.
Each row of ``results/cached.csv`` is one layer, projections and choice included, beside
one of causal attention, in turns, each with a cache of its own that it writes in place.
The window is of 512 tokens.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention import (
    METHODS,
    Attention,
    AttentionConfig,
    Cache,
    Sizes,
    empty_cache,
)
from sparsejax.bench.attention import BLOCK, race, ratio
from sparsejax.bench.selectors import milliseconds
from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.typing import Array, PyTree

SIZES = Sizes(512, 8, 2, 64)
STEPS = 20  # timed as one
COLUMNS = {
    "method": "method",
    "cached": "cached tokens",
    "ours_ms": "ours, ms",
    "dense_ms": "causal, ms",
    "dense_ratio": "times causal",
}


def configs() -> dict[str, AttentionConfig]:
    """Give what is compared: a window, and every method that can have a cache."""
    config = functools.partial(AttentionConfig, block_q=BLOCK, block_kv=BLOCK)
    methods = {name: config(selector=name) for name in METHODS if METHODS[name].causal}
    window = config(pattern="sliding_window", arguments={"window": 512})
    return {"window": window} | methods


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _step(graph: Any, state: PyTree, cache: Cache, x: Array) -> tuple[Array, Cache]:
    layer, start = nnx.merge(graph, state), cache.length
    out, longer = layer(x, positions=start[None, None], cache=cache)
    return out.value, longer._replace(length=start)  # the next is the same again


def runner(config: AttentionConfig, cached: int) -> Callable[[], Any]:
    """Give ``STEPS`` steps of a layer behind ``cached`` tokens, each the same."""
    layer = Attention(
        config, SIZES.width, SIZES.heads, SIZES.kv_heads, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)
    room = (cached // BLOCK + 1) * BLOCK
    empty = empty_cache(config, SIZES, 1, room, dtype="float32")
    filled = jax.tree.map(_drawn, empty)
    caches = [filled._replace(length=jnp.asarray(cached, "int32"))]
    x = jax.random.normal(jax.random.key(1), (1, 1, SIZES.width))

    def run() -> None:
        for _ in range(STEPS):
            out, caches[0] = _step(graph, state, caches[0], x)
            jax.block_until_ready(out)

    return run


def _drawn(x: Array) -> Array:
    return jax.random.normal(jax.random.key(0), x.shape, x.dtype) if x.ndim else x


def row_of(method: str, cached: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure a method behind so many tokens."""
    runners = {
        "ours": runner(configs()[method], cached),
        "dense": runner(AttentionConfig(block_kv=BLOCK), cached),
    }
    times = race(runners, rounds=rounds, seconds=seconds)
    each = {name: [t / STEPS for t in found] for name, found in times.items()}
    return {
        "method": method,
        "cached": str(cached),
        "ours_ms": milliseconds(each["ours"]),
        "dense_ms": milliseconds(each["dense"]),
        "dense_ratio": f"{ratio(times, 'dense', 'ours'):.3g}",
        "rounds": len(times["ours"]),
    }


def main(argv: list[str]) -> int:
    """Measure every method behind every number of tokens; write and print the table."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench cached")
    parser.add_argument("--methods", nargs="+", default=list(configs()))
    parser.add_argument("--cached", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    flags = parser.parse_args(argv)
    pace = {"rounds": flags.rounds, "seconds": flags.seconds}
    about = provenance()
    asked = itertools.product(flags.methods, flags.cached)
    rows = [row_of(*each, **pace) | about for each in asked]
    write_rows("cached", rows)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
