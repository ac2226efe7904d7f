"""Sums of what a model loses over the tokens of a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.nn import Transformer
from sparsejax.typing import Array, Float, Int

__all__ = ["Losses", "predicts", "token_losses"]


class Losses(NamedTuple):
    """Sums over the tokens of a batch that have a successor in their document."""

    nll: Float[Array, ""]  # nats
    z: Float[Array, ""]  # squared log-normalisers
    tokens: Float[Array, ""]
    bytes: Float[Array, ""]  # that those tokens stand for


def token_losses(
    model: Transformer,
    x: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    token_bytes: Int[np.ndarray, " v"],
    chunk: int = 0,
) -> Losses:
    """Sum the losses; with ``chunk``, logits of that many positions exist at a time."""

    def sums(x: Array, targets: Array, weights: Array) -> Losses:
        logits = model.logits(x)
        norm = jax.nn.logsumexp(logits, axis=-1)
        hit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        size = jnp.asarray(token_bytes)[targets].astype(jnp.float32)
        # A dot product has many accumulators: each mesh rounds it nearly alike.
        return Losses(
            jnp.vdot(norm - hit, weights),
            jnp.vdot(norm * norm, weights),
            jnp.sum(weights),
            jnp.vdot(size, weights),
        )

    if not chunk:
        return sums(x, targets, weights)

    def cut(y: Array) -> Array:
        parts = y.reshape(y.shape[0], -1, chunk, *y.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    parts = jax.lax.map(
        lambda part: jax.checkpoint(sums)(*part), (cut(x), cut(targets), cut(weights))
    )
    return jax.tree.map(jnp.sum, parts)


def predicts(segments: Int[Array, "b s"]) -> Float[Array, "b t"]:
    """1 where a token has a successor in its own document; 0 is padding."""
    real = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return real.astype(jnp.float32)
