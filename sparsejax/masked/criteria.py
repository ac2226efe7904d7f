"""Criteria: what is known about a weight in, its score out; higher is worth more.

Every criterion has the signature ``Evidence -> scores``, elementwise, in float32. It
knows nothing of masks and counts: a structure turns scores into a mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Float, PRNGKeyArray

__all__ = ["Evidence", "gradient", "magnitude", "random", "saliency"]


class Evidence(NamedTuple):
    """What there is to judge the weights of one layer by."""

    weight: Float[Array, "*shape"]
    gradient: Float[Array, "*shape"] | None  # dense; None before the first step
    key: PRNGKeyArray


def magnitude(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by its size."""
    return jnp.abs(seen.weight).astype(jnp.float32)


def random(seen: Evidence) -> Float[Array, "*shape"]:
    """Score every weight by a uniform number of its own."""
    return jax.random.uniform(seen.key, seen.weight.shape, jnp.float32)


def gradient(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by how much the loss follows it, live or not."""
    return jnp.abs(_gradient(seen))


def saliency(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by the first-order change of the loss when it is set to 0.

    Source: Lee et al. 2018, arXiv:1810.02340, Sec. 4.1. Departure: not normalised over
    layers, because every layer has a budget of its own.
    """
    return jnp.abs(seen.weight.astype(jnp.float32) * _gradient(seen))


def _gradient(seen: Evidence) -> Float[Array, "*shape"]:
    if seen.gradient is None:
        raise ValueError(
            "gradient=None: there is no gradient before the first step; choose"
            " initial_criterion='magnitude' or 'random', or start dense (initial=1)"
        )
    return seen.gradient.astype(jnp.float32)
