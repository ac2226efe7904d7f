"""Rotary position embedding: a rotation of queries and keys by their positions."""

import jax.numpy as jnp

from sparsejax.typing import Array, Float, Int

__all__ = ["rope"]


def rope(
    x: Float[Array, "b t h c"], positions: Int[Array, "b t"], *, theta: float
) -> Float[Array, "b t h c"]:
    """Rotate channel pairs by angles proportional to the position.

    Products of a rotated query and key depend on the difference of their positions
    only. Angles and rotation are computed in float32.

    Args:
        theta: the pairs' wavelengths run from ``2 pi`` to almost ``2 pi theta``.

    Raises:
        ValueError: if the head width is odd.

    Source: Su et al. 2021, arXiv:2104.09864, Eq. 34. Departure: channel ``n`` is paired
    with ``n + c/2``, not with its neighbour.
    """
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"head width {x.shape[-1]}: rotary embedding needs pairs")
    rate = theta ** (-jnp.arange(half, dtype="float32") / half)
    angle = positions.astype("float32")[..., None, None] * rate[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype("float32"), x[..., half:].astype("float32")
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
