"""State that is no parameter: what moves it is what a step saw, not a gradient."""

from typing import Any

import jax.numpy as jnp

from sparsejax.attention import moved
from sparsejax.memory import moved_moments
from sparsejax.moe import STATES, MoEConfig
from sparsejax.nn.config import ModelConfig, runs
from sparsejax.tree import map_with_path
from sparsejax.typing import Array, PyTree

__all__ = ["refreshed"]

STATISTICS = ("attention/sums", "attention/members")  # of no use to a reader of logs
EVIDENCE = "moe/evidence/"  # likewise
QUERIES = "memory/evidence/queries"


def refreshed(
    config: ModelConfig, variables: PyTree, metrics: dict[str, Array]
) -> tuple[PyTree, Any]:
    """Move routers' states and memories' moments by evidence, centroids to members.

    Args:
        config: the model's.
        variables: its state that is not parameters.
        metrics: of the step, a row for each layer that has them; given back without
            those that are needed here alone.
    """
    specs = [config.layer(n) for n in range(config.depth)]
    routed = [n for n, spec in enumerate(specs) if spec.feed_forward == config.ffn]
    remembered = [n for n, x in enumerate(specs) if x.feed_forward == config.memory]
    chosen = [n for n, spec in enumerate(specs) if spec.attention == config.attention]

    def rows(path: str, layers: list[int]) -> Array:
        parts = path.split("/")  # stacks/0/blocks/1/moe/bias
        run = runs(config)[int(parts[1])]
        first, period = run.start + int(parts[3]), len(run.period)
        return jnp.array([layers.index(first + n * period) for n in range(run.repeats)])

    def move(path: str, value: Array) -> Array:
        name = path.rpartition("/")[2]
        if name == "centroids":
            sums, members = (metrics[x][rows(path, chosen)] for x in STATISTICS)
            return moved(value, sums, members, config.attention.options.decay)
        if name == "moments":
            return moved_moments(value, metrics[QUERIES][rows(path, remembered)])
        if name in STATES and isinstance(config.ffn, MoEConfig):
            evidence = metrics[f"{EVIDENCE}{name}"][rows(path, routed)]
            return STATES[name].update(value, evidence, config.ffn)
        return value

    left = {
        name: x
        for name, x in metrics.items()
        if name not in (*STATISTICS, QUERIES) and not name.startswith(EVIDENCE)
    }
    return map_with_path(move, variables), left
