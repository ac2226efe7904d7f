"""Estimators: the weights that the model uses, and what their gradient becomes.

Every estimator has the signature ``(weight, mask) -> weight``. The value is always the
weight where the mask is live and exactly 0 elsewhere, whatever is stored there; they
differ in the gradient that reaches the stored weight.
"""

from functools import partial

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Bool, Float

__all__ = ["masked", "sr_ste", "straight_through"]


def masked(
    weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Pass the gradient to live weights only."""
    return jnp.where(mask, weight, jnp.zeros_like(weight))


@jax.custom_vjp
def straight_through(
    weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Pass the whole gradient, as if nothing had been masked."""
    return masked(weight, mask)


straight_through.defvjp(
    lambda weight, mask: (masked(weight, mask), None), lambda _, g: (g, None)
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sr_ste(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    decay: float = 2e-4,
) -> Float[Array, "*shape"]:
    """Pass the whole gradient, and pull the masked weights towards 0.

    The gradient is ``g + decay (1 - mask) weight``: what is masked stays masked more
    often, so the mask settles.

    Source: Zhou et al. 2021, arXiv:2102.04010, Sec. 3.3.

    Args:
        weight: as stored, dense.
        mask: what is live.
        decay: strength of the pull, in units of gradient per weight.
    """
    del decay
    return masked(weight, mask)


def _sr_ste_forward(weight: Array, mask: Array, decay: float) -> tuple[Array, tuple]:
    return sr_ste(weight, mask, decay), (weight, mask)


def _sr_ste_backward(decay: float, saved: tuple, g: Array) -> tuple[Array, None]:
    weight, mask = saved
    return g + masked(weight, ~mask) * jnp.asarray(decay, weight.dtype), None


sr_ste.defvjp(_sr_ste_forward, _sr_ste_backward)
