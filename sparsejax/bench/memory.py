"""What slots cost: a lookup, and a whole training step, of few and of many slots.

    python -m sparsejax.bench memory

``lookup`` rows find 16 of the slots for 4 heads of 2048 tokens; time should grow with
the root of the slots, and the fitted exponent is a row. Kernels that can run here are
compared with the plain search, and timed in turns with it: ``lookup, mosaic_gpu``.
``step`` rows take a step of a PEER layer, forward, backward and Adam, on 2048 tokens of
width 256, each of which runs 128 experts: once with its tables trained by rows and once
with dense gradients. What a table's size costs by itself is seen where the experts are
given, equally many of any table, spread over it: ``step, rows given``.
``growth`` is a time over that of the fewest slots, the two in turns; ``peak`` is what
XLA sets aside for a step, over the bytes of parameters and moments. ``rate`` is what a
device must move, over the time: of a lookup its queries, sub-keys and hits; of a step,
whatever its training, the rows that tokens read, forward and backward, and once more
each distinct one with its moments, read and written. ``copy`` is the rate at which the
same device reads and writes a large array.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pallas_kernels import KernelError
from sparsejax.bench.attention import race, ratio
from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.memory import PEER, PEERConfig, product_key_top_k
from sparsejax.memory.lookup import IMPLEMENTATIONS
from sparsejax.memory.peer import single_neurons
from sparsejax.train.optim import OptimConfig, make_optimizer
from sparsejax.train.tables import Tables, split
from sparsejax.typing import Array, Float, Int, Output, PyTree

TOKENS, WIDTH, HEADS, PER_HEAD = 2048, 256, 8, 16  # of the layer
LOOKUP = {"heads": 4, "key_width": 256, "k": 16}
COPIED = 2**28  # bytes, more than any cache holds
COLUMNS = {
    "work": "work",
    "slots": "slots",
    "training": "training",
    "ms": "ms",
    "growth": "over the fewest slots",
    "peak": "peak over parameters and moments",
    "rate": "GB/s",
}

Runner = Callable[[], Any]


class Step(NamedTuple):
    """A compiled step, and what it needs."""

    run: Runner
    peak: float
    moved: int  # bytes that it cannot do without


def copy(pace: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time reading a large array and writing one."""
    x = jnp.zeros(COPIED // 4, jnp.float32)
    run = jax.jit(jnp.negative).lower(x).compile()
    times = race({"copy": lambda: jax.block_until_ready(run(x))}, **pace)["copy"]
    yield {"work": "copy"} | shown(statistics.median(times), 2 * x.nbytes)


def lookup(slots: int, search: str) -> Runner:
    """Find the best slots of every token."""
    r, heads, width = math.isqrt(slots), LOOKUP["heads"], LOOKUP["key_width"]
    keys = jax.random.split(jax.random.key(0))
    queries = jax.random.normal(keys[0], (TOKENS, heads, width))
    halves = jax.random.normal(keys[1], (heads, 2, r, width // 2))
    find = partial(product_key_top_k, k=LOOKUP["k"], implementation=search)
    run = jax.jit(find).lower(queries, halves).compile()
    return lambda: jax.block_until_ready(run(queries, halves))


class Given(nnx.Module):
    """The experts of a PEER layer that are given: of any table equally many, evenly."""

    def __init__(self, layer: PEER, distinct: int) -> None:
        self.down, self.up = layer.down, layer.up
        self.distinct, self.spacing = distinct, layer.config.slots // distinct

    def __call__(self, x: Float[Array, "b t d"]) -> Output:
        """Run them, with equal weights."""
        ids, weights = self.choose(x[0])
        # Without the barrier XLA sorts them while it compiles, and no step has to.
        ids = jax.lax.optimization_barrier(ids)
        y = single_neurons(x[0], self.down[...], self.up[...], ids, weights)
        return Output(y[None], {}, {})

    def choose(
        self, rows: Float[Array, "n d"]
    ) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
        """Give the experts, whatever the tokens are, and their weights."""
        shape = len(rows), HEADS * PER_HEAD
        ids = np.random.default_rng(0).integers(0, self.distinct, shape, np.int32)
        return jnp.asarray(ids * self.spacing), jnp.ones(shape)


def step(slots: int, training: str, distinct: int | None = None) -> Step:
    """A step of a PEER layer whose state is donated, as in training.

    Args:
        distinct: rows that are read, if not those that the layer's lookup finds.
    """
    config = PEERConfig(sub_keys=math.isqrt(slots), heads=HEADS, per_head=PER_HEAD)
    layer = PEER(config, WIDTH, rngs=nnx.Rngs(0))
    model = layer if distinct is None else Given(layer, distinct)
    keys = jax.random.split(jax.random.key(1))
    batch = tuple(jax.random.normal(key, (1, TOKENS, WIDTH)) for key in keys)
    moved = moved_by(jax.jit(lambda model, x: model.choose(x)[0])(model, batch[0][0]))
    graph, params = nnx.split(model)
    make, tables = TRAININGS[training]
    optim = OptimConfig(learning_rate=1e-3, schedule="constant", tables=tables)
    state, train = make(graph, params, optim)
    del params
    compiled = jax.jit(train, donate_argnums=0).lower(state, *batch).compile()
    held = [state]
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    used: Any = compiled.memory_analysis()
    extra = used.temp_size_in_bytes + used.output_size_in_bytes
    peak = used.argument_size_in_bytes + extra - used.alias_size_in_bytes
    del state

    def run() -> None:
        held[0] = jax.block_until_ready(compiled(held[0], *batch))

    return Step(run, peak / size, moved)


def moved_by(ids: Int[Array, "*n"]) -> int:
    """Count the bytes of rows that a step of Adam on both tables must move.

    Args:
        ids: of all experts that are run.
    """
    row, tables = 4 * WIDTH, 2
    passes = 2 * ids.size  # forward, and backward for what the row was multiplied with
    kept = 2 * (3 * row + 4) * np.unique(ids).size  # row, moments and when, both ways
    return tables * (passes * row + kept)


def loss_of(graph: Any, params: PyTree, x: Array, target: Array) -> Array:
    """Match random targets: every token's output has a gradient."""
    return jnp.mean((nnx.merge(graph, params)(x).value - target) ** 2)


def densely(graph: Any, params: PyTree, optim: OptimConfig) -> tuple[PyTree, Any]:
    """Gradients of the table's shape, and an optimiser that moves every row."""
    optimizer = make_optimizer(optim, 1000, params)

    def train(state: PyTree, x: Array, target: Array) -> PyTree:
        params, opt = state
        grads = jax.grad(loss_of, 1)(graph, params, x, target)
        updates, opt = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    return (params, optimizer.init(params)), train


def by_rows(graph: Any, params: PyTree, optim: OptimConfig) -> tuple[PyTree, Any]:
    """The same step, but for the rows that nobody has read."""
    tables = Tables(optim, 1000, params)
    rest = split(params)[1]
    optimizer = make_optimizer(optim, 1000, params, rest)

    def train(state: PyTree, x: Array, target: Array) -> PyTree:
        params, opt, about, count = state
        rest = split(params)[1]
        sinks = tables.sinks(params, TOKENS)

        def loss(rest: PyTree, sinks: Any) -> Array:
            armed = nnx.merge_state(tables.armed(params, about, sinks), rest)
            return loss_of(graph, armed, x, target)

        grads, told = jax.grad(loss, (0, 1))(rest, sinks)
        rows = tables.gradients(params, about, told)
        updates, opt, factor = tables.clipped(optimizer, grads, opt, rest, rows)
        moved, about, _ = tables.update(params, about, rows, step=count, factor=factor)
        rest: Any = optax.apply_updates(rest, updates)
        return nnx.merge_state(moved, rest), opt, about, count + 1

    count = jnp.zeros((), jnp.int32)
    return (params, optimizer.init(rest), tables.init(params), count), train


TRAININGS = {"rows": (by_rows, "adam"), "dense": (densely, None)}


def searches() -> list[str]:
    """Name the searches that can run here, the plain one first."""
    scores = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)

    def can_run(name: str) -> bool:
        try:
            jax.eval_shape(partial(IMPLEMENTATIONS[name], k=1), scores, scores)
        except KernelError:
            return False
        return True

    return [name for name in IMPLEMENTATIONS if can_run(name)]


def check(names: list[str], slots: int) -> None:
    """Raise unless all find the same among whole numbers, many of them equal."""
    shape = 2, LOOKUP["heads"], TOKENS, math.isqrt(slots)
    rows, columns = jax.random.randint(jax.random.key(0), shape, -99, 100)
    halves = rows.astype("float32"), columns.astype("float32")
    plain, *others = (
        jax.jit(partial(IMPLEMENTATIONS[name], k=LOOKUP["k"]))(*halves)
        for name in names
    )
    for name, found in zip(names[1:], others, strict=True):
        if not jnp.array_equal(found, plain):
            raise SystemExit(f"{name} finds others of {slots} slots than {names[0]}")


def lookups(slots: list[int], pace: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time lookups in turns, and fit powers of the slots."""
    names = searches()
    for n in slots:
        check(names, n)
    made = {f"{name} {n}": lookup(n, name) for name in names for n in slots}
    times = race(made, **pace)
    for name in names:
        work = "lookup" if name == names[0] else f"lookup, {name}"
        medians = [statistics.median(times[f"{name} {n}"]) for n in slots]
        for n, seconds in zip(slots, medians, strict=True):
            growth = ratio(times, f"{name} {n}", f"{name} {slots[0]}")
            moved = 4 * LOOKUP["heads"] * LOOKUP["key_width"] * (TOKENS + math.isqrt(n))
            moved += 8 * LOOKUP["heads"] * LOOKUP["k"] * TOKENS
            yield {"work": work, "slots": n, **shown(seconds, moved, growth)}
        exponent = np.polyfit(np.log(slots), np.log(medians), 1)[0]
        yield {"work": f"{work}, exponent of slots", "ms": f"{exponent:.2f}"}


def steps(
    slots: list[int], training: str, pace: dict[str, Any], *, given: bool = False
) -> Iterator[dict[str, Any]]:
    """Time steps of few and many slots in turns; ``given`` rows are as many for all."""
    distinct = min(slots) if given else None
    made = {str(n): step(n, training, distinct) for n in slots}
    times = race({name: x.run for name, x in made.items()}, **pace)
    for n in slots:
        seconds = statistics.median(times[str(n)])
        growth = ratio(times, str(n), str(slots[0]))
        found = shown(seconds, made[str(n)].moved, growth)
        found |= {"training": training, "peak": f"{made[str(n)].peak:.2f}"}
        work = "step, rows given" if given else "step"
        yield {"work": work, "slots": n, **found}


def shown(seconds: float, moved: int, growth: float | None = None) -> dict[str, str]:
    """Write a time, and the bytes moved in it, as the table has them."""
    found = {"ms": f"{seconds * 1e3:.4g}", "rate": f"{moved / seconds / 1e9:.3g}"}
    return found if growth is None else found | {"growth": f"{growth:.3g}"}


def main(argv: list[str]) -> int:
    """Measure everything, write ``results/memory.csv`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench memory")
    halves = [2**12, 2**14, 2**16, 2**18, 2**20]
    parser.add_argument("--lookups", type=int, nargs="+", default=halves)
    parser.add_argument("--slots", type=int, nargs="+", default=[2**16, 2**20])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=25.0, help="for each race")
    flags = parser.parse_args(argv)
    pace, about = {"rounds": flags.rounds, "seconds": flags.seconds}, provenance()
    blank = dict.fromkeys(COLUMNS, "")
    rows: list[dict[str, Any]] = []
    for found in (
        copy(pace),
        lookups(flags.lookups, pace),
        steps(flags.slots, "rows", pace),
        steps(flags.slots, "rows", pace, given=True),
        steps(flags.slots, "dense", pace),
    ):
        rows += [blank | row | about for row in found]
        write_rows("memory", rows)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
