"""Attention by definition: the dense score matrix, in the inputs' own precision."""

import jax.numpy as jnp

from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.typing import Array, Float

__all__ = ["reference"]


def reference(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    v: Float[Array, "b s g _"],
    mask: BlockMask,
    *,
    scale: float,
    softcap: float | None = None,
    segments: Segments | None = None,
    bias: Float[Array, "b g s"] | None = None,
) -> Attended:
    """Masked softmax attention over a dense score matrix; rows of no key give 0."""
    wide = "float64" if q.dtype == "float64" else "float32"
    (b, t, h, c), s = q.shape, k.shape[1]
    grouped = q.astype(wide).reshape(b, t, k.shape[2], -1, c)
    scores = scale * jnp.einsum("btgrc,bsgc->bgrts", grouped, k.astype(wide))
    scores = scores.reshape(b, h, t, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        each = bias.astype(wide).repeat(h // k.shape[2], axis=1)
        scores = scores + each[:, :, None, :]
    visible = mask.to_dense()
    if segments is not None:
        same = segments.q[:, None, :, None] == segments.kv[:, None, None, :]
        visible = visible & same & (segments.q != 0)[:, None, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    seen = jnp.isfinite(top)
    weights = jnp.exp(scores - jnp.where(seen, top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)[..., 0]
    weights = (weights / jnp.where(seen, total, 1)).reshape(b, k.shape[2], -1, t, s)
    values = jnp.einsum("bgrts,bsgc->bgrtc", weights, v.astype(wide))
    return Attended(jnp.moveaxis(values.reshape(b, h, t, -1), 1, 2), lse)
