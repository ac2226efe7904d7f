"""Clipping by the norm of all gradients, where some are not in the optimiser's tree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax.typing import Array, Float, PyTree

__all__ = ["ClipState", "clip_all"]


class ClipState(NamedTuple):
    """What the last gradients were multiplied with."""

    clip_factor: Float[Array, ""]


def clip_all(limit: float) -> optax.GradientTransformationExtraArgs:
    """Clip by the norm of all gradients, here and ``outside``: a sum of squares."""

    def init(params: PyTree) -> ClipState:
        del params
        return ClipState(jnp.ones(()))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Array
    ) -> tuple[PyTree, ClipState]:
        del state, params
        norm = jnp.sqrt(jnp.square(optax.tree.norm(updates)) + extra["outside"])
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda x: x * factor, updates), ClipState(factor)

    return optax.GradientTransformationExtraArgs(init, update)
