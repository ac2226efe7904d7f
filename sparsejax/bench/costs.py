"""What every masked layer of a config costs, counted and measured.

    python -m sparsejax.bench costs --config=configs/masked.py:blast
    python -m sparsejax.bench costs --config=configs/masked.py:rigl --rows=1

Masks are those that the plan would begin with at the density that it ends with: random
ones, but where it measures a first batch. A layer's first matrix multiplies so many
rows, in turns with the dense product; a layer that executes the dense product is not
called faster, however the two times come out.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import masked, tree
from sparsejax.bench.attention import race
from sparsejax.bench.moe import bound
from sparsejax.bench.table import markdown
from sparsejax.config import ConfigError, convert, read
from sparsejax.masked.blocked import Blocked
from sparsejax.masked.report import LayerCost, layer_costs
from sparsejax.train.config import Config
from sparsejax.train.loop import Trainer
from sparsejax.train.step import State, Step
from sparsejax.train.trained import alone

VOCABULARY = 258
COLUMNS = {"path": "layer", "matrix": "matrix", "parameters": "parameters"}
COLUMNS |= {"nonzero": "non-zero", "dense": "kB", "sparse": "kB with indices"}
COLUMNS |= {"useful": "useful FLOPs a row", "executed": "executed"}
COLUMNS |= {"dense_ms": "dense, ms", "ms": "ms", "faster": "faster"}


def ended(config: Config) -> State:
    """Begin with the masks of the plan's end."""
    plan = config.masked
    if plan is None:
        raise ConfigError("config.masked=None: there is no mask to report on")
    last = {"initial": plan.density, "schedule": "constant", "rewind": None}
    config = replace(config, masked=replace(plan, **last))
    step = Step(config, VOCABULARY, np.ones(VOCABULARY))
    if not step.measures:
        return jax.jit(step.init)(jax.random.key(config.seed))
    mesh = alone()
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        trainer.data.train.close()
        return trainer.init()


def measured(
    cost: LayerCost, weight: Any, rows: int, pace: Mapping[str, Any]
) -> LayerCost:
    """Time one matrix, as it multiplies and as a dense one does."""
    x = jax.random.normal(jax.random.key(0), (rows, cost.matrix[0]))
    dense = weight.weight if isinstance(weight, Blocked) else weight
    first = jax.tree.map(lambda w: w.reshape(-1, *w.shape[-2:])[0], weight)
    if not isinstance(weight, Blocked):
        first = dense.reshape(-1, *cost.matrix)[0]
    runners = {
        "ours": bound(lambda x, w: x @ w, x, first, backward=False),
        "dense": bound(
            jnp.matmul, x, dense.reshape(-1, *cost.matrix)[0], backward=False
        ),
    }
    times = {name: statistics.median(t) for name, t in race(runners, **pace).items()}
    return cost._replace(seconds=times["ours"], dense_seconds=times["dense"])


def faster(cost: LayerCost) -> str:
    """Say by how much, or why not."""
    try:
        return f"{cost.speedup:.2f} x"
    except ValueError:
        return "no: a mask"


def row(cost: LayerCost) -> dict[str, str]:
    """Lay a layer out."""
    sides = " x ".join(map(str, cost.matrix))
    times = (cost.dense_seconds or math.nan, cost.seconds or math.nan)
    return {
        "path": f"`{cost.path}`",
        "matrix": f"{cost.layers} of {sides}",
        "parameters": f"{cost.parameters:,}",
        "nonzero": f"{cost.nonzero:,}",
        "dense": f"{cost.bytes_dense / 1e3:,.0f}",
        "sparse": f"{cost.bytes_sparse / 1e3:,.0f}",
        "useful": f"{cost.useful_flops:,.0f}",
        "executed": f"{cost.executed_flops:,.0f}",
        "dense_ms": f"{times[0] * 1e3:.3f}",
        "ms": f"{times[1] * 1e3:.3f}",
        "faster": faster(cost),
    }


def main(argv: list[str]) -> int:
    """Print a row for every masked layer."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench costs")
    parser.add_argument("--config", required=True)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each layer")
    flags = parser.parse_args(argv)
    config = convert(Config, read(flags.config))
    state = ended(config)
    plan: Any = replace(config.masked, rewind=None) if config.masked else None
    costs = layer_costs(state.params, masked.masks_of(state.opt), plan)
    used = masked.effective(state.params, state.opt, plan, training=False)
    weights = {path: x.get_value() for path, x in tree.variables(used).items()}
    pace = {"rounds": flags.rounds, "seconds": flags.seconds}
    found = [measured(c, weights[c.path], flags.rows, pace) for c in costs]
    sys.stdout.write(markdown([row(cost) for cost in found], COLUMNS) + "\n")
    return 0
