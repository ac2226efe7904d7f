"""What queries and keys go through before they meet: a norm, and a rotation."""

import math

import jax
import jax.numpy as jnp

from sparsejax.attention.rope_scaling import RopeScaling
from sparsejax.typing import Array, Float, Int

__all__ = ["head_norm", "rope"]

# Taylor's, in the square: to float32's last place up to an eighth of a turn.
SINE = [(-1) ** n / math.factorial(2 * n + 1) for n in range(6)]
COSINE = [(-1) ** n / math.factorial(2 * n) for n in range(6)]


def head_norm(
    x: Float[Array, "b t h c"], scale: Float[Array, "*over c"], *, epsilon: float = 1e-6
) -> Float[Array, "b t h c"]:
    """Divide by the root mean square over what ``scale`` covers, in float32.

    Args:
        scale: " c", a head's width, or "h c", all heads together.
    """
    wide, over = x.astype("float32"), tuple(range(-scale.ndim, 0))
    square = jnp.square(wide).mean(over, keepdims=True)
    wide = wide * jax.lax.rsqrt(square + epsilon)
    scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return (wide * scale.astype("float32")).astype(x.dtype)


def rope(
    x: Float[Array, "b t h c"],
    positions: Int[Array, "b t"],
    *,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "b t h c"]:
    """Rotate channel pairs by angles proportional to the position.

    Products of a rotated query and key depend on the difference of their positions
    only. Angles and rotation are computed in float32.

    Args:
        theta: the pairs' wavelengths run from ``2 pi`` to almost ``2 pi theta``.
        scaling: changes the wavelengths for longer texts.

    Raises:
        ValueError: if the head width is odd.

    Source: Su et al. 2021, arXiv:2104.09864, Eq. 34. Departure: channel ``n`` is paired
    with ``n + c/2``, not with its neighbour.
    """
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"head width {x.shape[-1]}: rotary embedding needs pairs")
    rate = theta ** (-jnp.arange(half, dtype="float32") / half) / (2 * math.pi)
    if scaling is not None:
        rate = scaling.rates(rate, theta)
    turns = positions.astype("float32")[..., None, None] * rate[None, None, None]
    cos, sin = _on_circle(turns)
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
    a, b = x[..., :half].astype("float32"), x[..., half:].astype("float32")
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _on_circle(turns: Float[Array, "*shape"]) -> tuple[Array, Array]:
    """Cosine and sine of so many turns.

    XLA's are ready for angles of any size, which is 200 instructions a number on a TPU.
    """
    quarters = jnp.round(4 * turns)
    angle = (4 * turns - quarters) * (math.pi / 2)
    square = angle * angle
    cos, sin = (jnp.zeros_like(square) for _ in range(2))
    for n in reversed(COSINE):
        cos = cos * square + n
    for n in reversed(SINE):
        sin = sin * square + n
    sin = sin * angle
    quarter = quarters.astype("int32")
    odd = quarter & 1 == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    left, below = ((quarter + n) & 2 == 2 for n in (1, 0))
    return jnp.where(left, -cos, cos), jnp.where(below, -sin, sin)
