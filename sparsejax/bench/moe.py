"""What grouping costs: a grouped product and a whole layer beside dense ones.

    python -m sparsejax.bench moe

Float32, 512 to 512. ``grouped`` rows multiply 4096 rows, routed unevenly, by one weight
for each of 8, 32 or 128 experts, in turns with one dense product of the same FLOPs and
with ``jax.lax.ragged_dot``. ``gate, up`` rows multiply them by two weights for each of
8 experts and gate one by the other; ``fused`` is one product with both weights side by
side. ``layer`` rows run a dropless mixture of 2 of 8 experts on 2048 tokens beside a
dense feed-forward of the same active FLOPs; ``moving`` is the same mixture without its
experts: router, sort, gather and combine. Every pair of columns is a time and how it
compares with ours: above 1, ours is faster.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.bench.attention import race, ratio
from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.moe import MoE, MoEConfig, grouped_matmul
from sparsejax.moe.order import combine, sort, take
from sparsejax.typing import Array

ROWS, WIDTH, HIDDEN = 4096, 512, 512
EXPERTS, CHOSEN, TOKENS = 8, 2, 2048  # of the layer
# Masked products of every group with every row: beyond this, half a minute a turn.
RAGGED_LIMIT = 32
PASSES = "forward", "forward + backward"
NAMES = ("ours", "dense", "ragged_dot", "fused", "moving")
COLUMNS = {"work": "work", "experts": "experts", "pass": "pass", "ours_ms": "ours, ms"}
COLUMNS |= {f"{n}_{x}": f"{n}, {x}" for n in NAMES[1:] for x in ("ms", "ratio")}

Runner = Callable[[], Any]


def skewed(rows: int, experts: int) -> Array:
    """Count the rows that a router with preferences of its own sends to each expert."""
    keys = jax.random.split(jax.random.key(1))
    liked = jax.random.normal(keys[0], (1, experts))
    logits = jax.random.normal(keys[1], (rows, experts)) + liked
    return jnp.bincount(logits.argmax(axis=1), length=experts).astype("int32")


def bound(f: Callable[..., Any], *arrays: Any, backward: bool) -> Runner:
    """Compile ``f``, or it and the gradients of all its arrays, on those arrays."""

    def both(*arrays: Any) -> Any:
        y, back = jax.vjp(f, *arrays)
        return y, back(jnp.ones_like(y))

    run = jax.jit(both if backward else f).lower(*arrays).compile()
    return lambda: jax.block_until_ready(run(*arrays))


def grouped(experts: int, *, backward: bool) -> dict[str, Runner]:
    """Runners of one product with uneven groups."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (ROWS, WIDTH))
    w = jax.random.normal(keys[1], (experts, WIDTH, HIDDEN)) / WIDTH**0.5
    sizes = skewed(ROWS, experts)
    found = {
        "ours": bound(
            lambda x, w: grouped_matmul(x, w, sizes), x, w, backward=backward
        ),
        "dense": bound(jnp.matmul, x, w[0], backward=backward),
    }
    if experts <= RAGGED_LIMIT:
        ragged = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
        found["ragged_dot"] = bound(ragged, x, w, backward=backward)
    return found


def gated(*, backward: bool) -> dict[str, Runner]:
    """Runners of what gated experts begin with: two products, or one twice as wide."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (ROWS, WIDTH))
    shape = (EXPERTS, WIDTH, HIDDEN)
    gate, up = (jax.random.normal(k, shape) / WIDTH**0.5 for k in keys[1:])
    sizes = skewed(ROWS, EXPERTS)

    def two(x: Array, gate: Array, up: Array) -> Array:
        first = jax.nn.silu(grouped_matmul(x, gate, sizes))
        return first * grouped_matmul(x, up, sizes)

    def one(x: Array, both: Array) -> Array:
        y = grouped_matmul(x, both, sizes)
        return jax.nn.silu(y[:, :HIDDEN]) * y[:, HIDDEN:]

    def dense(x: Array, gate: Array, up: Array) -> Array:
        return jax.nn.silu(x @ gate) * (x @ up)

    both = jnp.concatenate([gate, up], axis=-1)
    return {
        "ours": bound(two, x, gate, up, backward=backward),
        "dense": bound(dense, x, gate[0], up[0], backward=backward),
        "fused": bound(one, x, both, backward=backward),
    }


def layer(*, backward: bool) -> dict[str, Runner]:
    """Runners of a whole mixture, of its dense equal, and of the moving alone."""
    config = MoEConfig(experts=EXPERTS, per_token=CHOSEN, hidden=HIDDEN)
    graph, state = nnx.split(MoE(config, WIDTH, rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (1, TOKENS, WIDTH))
    active = CHOSEN * HIDDEN
    shapes = (WIDTH, active), (WIDTH, active), (active, WIDTH)
    pairs = zip(keys[1:], shapes, strict=True)
    weights = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in pairs]

    def mixture(x: Array, state: Any) -> Array:
        return nnx.merge(graph, state)(x).value

    def dense(x: Array, gate: Array, up: Array, down: Array) -> Array:
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    def moving(x: Array, router: Array) -> Array:
        flat = x[0]
        routing = config.route(flat @ router, {})
        order = sort(routing.experts, EXPERTS)
        places = order.places.reshape(routing.experts.T.shape)
        rows = take(flat, order.slots % TOKENS, places)
        y = take(rows, order.places, order.slots[None])
        return combine(y, routing.weights, routing.experts == EXPERTS)

    router = 0.02 * jax.random.normal(keys[0], (WIDTH, EXPERTS))
    return {
        "ours": bound(mixture, x, state, backward=backward),
        "dense": bound(dense, x, *weights, backward=backward),
        "moving": bound(moving, x, router, backward=backward),
    }


def row(
    runners: dict[str, Runner],
    *,
    rounds: int,
    seconds: float,
    names: tuple[str, ...] = NAMES,
) -> dict[str, Any]:
    """Let them run in turns; an absent one leaves its columns empty."""
    times = race(runners, rounds=rounds, seconds=seconds)
    found: dict[str, Any] = {}
    for name in names:
        known = name in times
        median = statistics.median(times[name]) * 1e3 if known else None
        found[f"{name}_ms"] = f"{median:.2f}" if known else ""
        found[f"{name}_ratio"] = f"{ratio(times, name, 'ours'):.3g}" if known else ""
    return found | {"rounds": len(times["ours"])}


def main(argv: list[str]) -> int:
    """Measure everything, write ``results/moe.csv`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench moe")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row")
    flags = parser.parse_args(argv)
    pace, about = {"rounds": flags.rounds, "seconds": flags.seconds}, provenance()
    works: list[tuple[str, int, Callable[..., dict[str, Runner]]]] = [
        *(("grouped", e, functools.partial(grouped, e)) for e in flags.experts),
        ("gate, up", EXPERTS, gated),
        ("layer", EXPERTS, layer),
    ]
    rows = []
    for name, experts, make in works:
        for backward in (False, True):
            key = {"work": name, "experts": experts, "pass": PASSES[backward]}
            rows.append(key | row(make(backward=backward), **pace) | about)
            write_rows("moe", rows)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
