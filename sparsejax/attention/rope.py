"""What queries and keys go through before they meet: a norm, and a rotation."""

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Float, Int

__all__ = ["head_norm", "rope"]


def head_norm(
    x: Float[Array, "b t h c"], scale: Float[Array, " c"]
) -> Float[Array, "b t h c"]:
    """Divide by the root mean square over the head's width, in float32."""
    wide = x.astype("float32")
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * scale[None, None, None]).astype(x.dtype)


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
