"""Criteria: what is known about a weight in, its score out; higher is worth more.

Every criterion has the signature ``Evidence -> scores``, elementwise, in float32. It
knows nothing of masks and counts: a structure turns scores into a mask, within a layer
or, under an allocation that ranks, over all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Float, PRNGKeyArray

__all__ = [
    "Evidence",
    "fisher",
    "gradient",
    "grasp",
    "magnitude",
    "momentum",
    "movement",
    "random",
    "saliency",
]


class Evidence(NamedTuple):
    """What there is to judge the weights of one layer by; None is not known."""

    weight: Float[Array, "*shape"]
    gradient: Float[Array, "*shape"] | None  # dense; None before the first step
    key: PRNGKeyArray
    momentum: Float[Array, "*shape"] | None = None  # first moment of the gradient
    variance: Float[Array, "*shape"] | None = None  # second moment
    movement: Float[Array, "*shape"] | None = None  # sum of -weight x gradient
    curvature: Float[Array, "*shape"] | None = None  # Hessian x gradient
    logits: Float[Array, "groups candidates"] | None = None  # of learned masks


def magnitude(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by its size."""
    return jnp.abs(seen.weight).astype(jnp.float32)


def random(seen: Evidence) -> Float[Array, "*shape"]:
    """Score every weight by a uniform number of its own."""
    return jax.random.uniform(seen.key, seen.weight.shape, jnp.float32)


def gradient(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by how much the loss follows it, live or not."""
    return jnp.abs(_known(seen, "gradient"))


def saliency(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by the first-order change of the loss when it is set to 0.

    Source: Lee et al. 2018, arXiv:1810.02340, Sec. 4.1. Departure: not normalised,
    which changes no ranking.
    """
    return jnp.abs(seen.weight.astype(jnp.float32) * _known(seen, "gradient"))


def momentum(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by the size of the running mean of its gradient.

    Source: Dettmers and Zettlemoyer 2019, arXiv:1907.04840, Sec. 3.
    """
    return jnp.abs(_known(seen, "momentum"))


def fisher(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by the second-order change of the loss when it is set to 0.

    The curvature is the diagonal of the empirical Fisher matrix, which the second
    moment of an optimiser estimates: ``weight^2 variance``.

    Source: Theis et al. 2018, arXiv:1801.05787, Sec. 2.1. Departure: the optimiser's
    running mean is in the place of one over the data.
    """
    return jnp.square(seen.weight.astype(jnp.float32)) * _known(seen, "variance")


def movement(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by how far the loss has pushed it away from 0, with its sign.

    Source: Sanh et al. 2020, arXiv:2005.07683, Sec. 4.
    """
    return _known(seen, "movement")


def grasp(seen: Evidence) -> Float[Array, "*shape"]:
    """Score a weight by how much gradient flow is lost when it is set to 0.

    Source: Wang et al. 2020, arXiv:2002.07376, Sec. 4. Departure: of the opposite sign,
    so that high scores are kept.
    """
    return seen.weight.astype(jnp.float32) * _known(seen, "curvature")


_REMEDIES = {
    "gradient": "there is no gradient before the first step; choose"
    " initial_criterion='magnitude' or 'random', start dense (initial=1), or give"
    " sparse(..., measured=measure(loss, params))",
    "curvature": "the curvature is known only to sparse(..., measured="
    "measure(loss, params)), and only to initial masks; choose another criterion",
}


def _known(seen: Evidence, name: str) -> Float[Array, "*shape"]:
    value = getattr(seen, name)
    if value is None:
        remedy = _REMEDIES.get(
            name,
            f"there is no {name} before the first step; choose"
            " initial_criterion='magnitude' or 'random', or start dense (initial=1)",
        )
        raise ValueError(f"{name}=None: {remedy}")
    return value.astype(jnp.float32)
