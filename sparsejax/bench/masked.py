"""What masks cost and what they save: products of live blocks, and whole steps.

    python -m sparsejax.bench masked

``product`` rows multiply 4096 rows by a float32 weight, 2048 to 2048, of which a share
of the 64 x 64 blocks is live, in turns with the dense product of the same shape;
``limit`` is a dense product of the useful FLOPs alone. ``feed-forward`` rows are a
gated layer of such blocks, 2048 rows, 512 to 2048 and back, beside the dense one.
``fan-in`` rows take one row through weights of which every output has equally many
inputs, as many as no cache holds when they are dense, like the layers of a model.
``step`` rows take a step of ``configs/dense.py`` with its weights under an unstructured
mask: one that only applies it, and one that changes it by RigL, in turns with the step
that has none; and a step of ``configs/masked.py:blast`` with the masks of its end, in
turns with the same masks and dense products. A ratio above 1 says by how much ours is
faster; a mask alone saves no time, so a step's is below.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.bench.moe import PASSES, bound, row
from sparsejax.bench.table import ROOT, markdown, provenance, write_rows
from sparsejax.config import convert, read
from sparsejax.data import Batch
from sparsejax.masked import BlockSparse, ConstantFanIn, FanIn, block_sparse_matmul
from sparsejax.masked.blocked import Blocked
from sparsejax.train.config import Config
from sparsejax.train.step import Step
from sparsejax.typing import Array

ROWS, WIDTH, BLOCK = 4096, 2048, 64
FEW = 0.1  # density of all but the first rows
DEEP = 8  # weights that a single row goes through: 128 MiB
VOCABULARY = 258
LAYER = 2048, 512, 2048  # rows, width and hidden width of a feed-forward layer
NEVER = 10**6
PLAN: dict[str, Any] = {"density": 0.2, "initial": 0.2, "schedule": "constant"}
PLAN |= {"updater": "rigl", "criterion": "magnitude", "end": NEVER}
STEPS = {
    "mask held": PLAN | {"begin": NEVER},
    "mask changed by RigL": PLAN | {"every": 1},
}
HELD = {"initial": 0.1, "schedule": "constant", "begin": NEVER, "end": NEVER}
NAMES = ("ours", "dense", "limit")
COLUMNS = {"work": "work", "density": "density", "pass": "pass", "ours_ms": "ours, ms"}
COLUMNS |= {f"{n}_{x}": f"{n}, {x}" for n in NAMES[1:] for x in ("ms", "ratio")}

Runner = Callable[[], Any]


def product(density: float, *, backward: bool) -> dict[str, Runner]:
    """Runners of one product, of its dense equal, and of its useful FLOPs alone."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (ROWS, WIDTH))
    w = jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5
    side = WIDTH // BLOCK
    live = np.zeros(side * side, bool)
    count = round(density * live.size)
    live[np.random.default_rng(0).permutation(live.size)[:count]] = True
    blocks = BlockSparse.from_dense(w, live.reshape(side, side))

    def ours(x: Array, values: Array, rows: Array, columns: Array) -> Array:
        own = BlockSparse(values, rows, columns, w.shape)
        return block_sparse_matmul(x, own)

    def both(x: Array, values: Array, *ids: Array) -> Any:
        y, back = jax.vjp(lambda x, values: ours(x, values, *ids), x, values)
        return y, back(jnp.ones_like(y))

    own = bound(
        both if backward else ours,
        *(x, blocks.values, blocks.rows, blocks.columns),
        backward=False,
    )
    part = w[:, : max(round(density * WIDTH), 1)]
    return {
        "ours": own,
        "dense": bound(jnp.matmul, x, w, backward=backward),
        "limit": bound(jnp.matmul, x, part, backward=backward),
    }


def feed_forward(density: float, *, backward: bool) -> dict[str, Runner]:
    """Runners of a gated layer with live blocks, and of its dense equal."""
    rows, width, hidden = LAYER
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (rows, width))
    shapes = (width, hidden), (width, hidden), (hidden, width)
    pairs = zip(keys[1:], shapes, strict=True)
    weights = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in pairs]
    masks, random = [], np.random.default_rng(0)
    for shape in shapes:
        grid = shape[0] // BLOCK, shape[1] // BLOCK
        order = random.permutation(math.prod(grid)).reshape(grid)
        masks.append(jnp.asarray(order < round(density * math.prod(grid))))

    def layer(x: Array, gate: Any, up: Any, down: Any) -> Array:
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    def ours(x: Array, *weights: Array) -> Array:
        most = round(density * masks[0].size)
        blocked = [
            Blocked(w, live, None, most) for w, live in zip(weights, masks, strict=True)
        ]
        return layer(x, *blocked)

    return {
        "ours": bound(ours, x, *weights, backward=backward),
        "dense": bound(layer, x, *weights, backward=backward),
    }


def fan_in(density: float) -> dict[str, Runner]:
    """Runners of one row by weights of constant fan-in, and by dense ones."""
    keys = jax.random.split(jax.random.key(0), DEEP + 1)
    x = jax.random.normal(keys[0], (1, WIDTH))
    weights = []
    for key in keys[1:]:
        w = jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
        mask = ConstantFanIn()(jnp.abs(w), round(density * WIDTH) * WIDTH)
        weights.append(jnp.where(mask, w, 0))

    def through(x: Array, *weights: Any) -> Array:
        for w in weights:
            x = x @ w
        return x

    gathered = [FanIn.from_dense(w) for w in weights]
    return {
        "ours": bound(through, x, *gathered, backward=False),
        "dense": bound(through, x, *weights, backward=False),
    }


def blast(products: str) -> Runner:
    """A step with the masks of the end of that config's plan."""
    values = read(f"{ROOT / 'configs' / 'masked.py'}:blast")
    return step(values["masked"] | HELD | {"products": products}, values)


def step(plan: dict[str, Any] | None, values: dict[str, Any] | None = None) -> Runner:
    """A compiled step that goes on from its own state."""
    values = read(ROOT / "configs" / "dense.py") if values is None else values
    values["masked"] = plan
    values["train"]["steps"] = 2 * NEVER
    config = convert(Config, values)
    made = Step(config, VOCABULARY, np.ones(VOCABULARY))
    held = [jax.jit(made.init)(jax.random.key(0))]
    size = config.data.batch_size, config.data.seq_len + 1
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, size, np.int32)
    places = np.broadcast_to(np.arange(size[1], dtype=np.int32), size)
    batch = Batch(tokens, np.ones(size, np.int32), places)
    compiled = jax.jit(made.train, donate_argnums=0).lower(held[0], batch).compile()

    def run() -> None:
        held[0] = jax.block_until_ready(compiled(held[0], batch))[0]

    return run


def _others() -> Iterator[tuple[str, str, Callable[[], dict[str, Runner]]]]:
    """Name all but the products, and say how to make their runners."""
    yield "fan-in", PASSES[0], lambda: fan_in(FEW)
    for backward in (False, True):
        make = partial(feed_forward, FEW, backward=backward)
        yield "feed-forward", PASSES[backward], make
    dense = step(None)
    for name, plan in STEPS.items():
        make = partial(lambda plan: {"ours": step(plan), "dense": dense}, plan)
        yield f"step, {name}", "step", make
    both = {"ours": "blocks", "dense": "dense"}
    make = lambda: {name: blast(products) for name, products in both.items()}  # noqa: E731
    yield "step, live blocks", "step", make


def main(argv: list[str]) -> int:
    """Measure everything, write ``results/masked.csv`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench masked")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each row")
    flags = parser.parse_args(argv)
    pace: dict[str, Any] = {"rounds": flags.rounds, "seconds": flags.seconds}
    pace, about, rows = pace | {"names": NAMES}, provenance(), []
    for density in flags.densities:
        for backward in (False, True):
            key = {"work": "product", "density": density, "pass": PASSES[backward]}
            rows.append(key | row(product(density, backward=backward), **pace) | about)
            write_rows("masked", rows)
    for work, name, make in _others():
        density = PLAN["density"] if "mask" in work else FEW
        key = {"work": work, "density": density, "pass": name}
        rows.append(key | row(make(), **pace) | about)
        write_rows("masked", rows)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
