"""A short causal convolution over keys, which lets neighbours find each other."""

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Float, Int

__all__ = ["key_conv"]


def key_conv(
    k: Float[Array, "b t g c"],
    taps: Float[Array, "w g c"],
    *,
    before: Float[Array, "b _ g c"],
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t g c"]:
    """Add to every key ``silu`` of a weighted sum of itself and the keys before it.

    Channels do not mix; taps of 0 leave the keys as they are.

    Args:
        k: keys before norm and rotation.
        taps: weights, that of the key itself first.
        before: the ``w - 1`` keys before these; zeros at the beginning.
        segments: documents, which do not see each other.

    Source: Xiao et al. 2025, arXiv:2511.11571, Sec. 3.
    """
    width, t = taps.shape[0], k.shape[1]
    line = jnp.concatenate([before.astype(k.dtype), k], axis=1)
    total = jnp.zeros_like(k)
    for lag in range(width):
        start = width - 1 - lag
        part = line[:, start : start + t] * taps[None, None, lag].astype(k.dtype)
        if segments is not None and lag:
            old = jnp.pad(segments, [(0, 0), (lag, 0)], constant_values=-1)[:, :t]
            part = jnp.where((old == segments)[..., None, None], part, 0)
        total = total + part
    return k + jax.nn.silu(total)
