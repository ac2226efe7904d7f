"""State that is no parameter: what moves it is what a step saw, not a gradient."""

from typing import Any

import jax.numpy as jnp

from sparsejax.attention import moved
from sparsejax.moe import MoEConfig, updated_bias
from sparsejax.nn.config import ModelConfig, runs
from sparsejax.tree import map_with_path
from sparsejax.typing import Array, PyTree

__all__ = ["refreshed"]

STATISTICS = ("attention/sums", "attention/members")  # of no use to a reader of logs


def refreshed(
    config: ModelConfig, variables: PyTree, metrics: dict[str, Array]
) -> tuple[PyTree, Any]:
    """Move every router's bias by its experts' load, and centroids to their members.

    Args:
        config: the model's.
        variables: its state that is not parameters.
        metrics: of the step, a row for each layer that has them; given back without
            those that are needed here alone.
    """
    specs = [config.layer(n) for n in range(config.depth)]
    routed = [n for n, spec in enumerate(specs) if spec.feed_forward == config.ffn]
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
        if name == "bias" and isinstance(config.ffn, MoEConfig):
            load = metrics["moe/load"][rows(path, routed)]
            return updated_bias(value, load, config.ffn.bias_rate or 0.0)
        return value

    left = {name: x for name, x in metrics.items() if name not in STATISTICS}
    return map_with_path(move, variables), left
