"""The same parameters under other attention, without learning anything."""

import dataclasses
from typing import Any

from flax import nnx

from sparsejax.config import ConfigError
from sparsejax.nn.transformer import Transformer
from sparsejax.tree import leaves

__all__ = ["attending"]


def attending(model: Transformer, **changes: Any) -> Transformer:
    """Give a model of the same parameters whose attention config differs.

    Args:
        changes: fields of ``AttentionConfig``: another pattern, say, or its arguments.

    Raises:
        ConfigError: if the change asks for other parameters.
    """
    attention = dataclasses.replace(model.config.attention, **changes)
    config = dataclasses.replace(model.config, attention=attention)
    vocabulary = model.vocabulary
    graph, wanted = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, vocabulary, rngs=nnx.Rngs(0)))
    )
    state = nnx.state(model)
    shapes = [{k: x.shape for k, x in leaves(tree).items()} for tree in (state, wanted)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"attention with {changes}: needs other parameters than the model has;"
            " change what needs none, a pattern say"
        )
    return nnx.merge(graph, state)
