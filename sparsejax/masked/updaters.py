"""Updaters: a mask and the evidence in, the next mask out.

Every updater has the signature ``(mask, seen, rule) -> mask`` and is one set of
arguments of ``prune_and_grow``; the mask it returns has exactly ``rule.keep`` weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from sparsejax.masked.criteria import Evidence, gradient, random
from sparsejax.masked.structures import Structure
from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["Rule", "prune", "prune_and_grow", "rigl", "select", "set_", "static"]

Criterion = Callable[[Evidence], Float[Array, "*shape"]]


class Rule(NamedTuple):
    """What the plan asks of this update of this layer."""

    structure: Structure
    criterion: Criterion  # what the weights are kept by
    keep: int | Int[Array, ""]  # live weights after the update
    moved: int | Int[Array, ""] = 0  # of those, how many are grown anew


def prune_and_grow(
    mask: Bool[Array, "*shape"],
    seen: Evidence,
    rule: Rule,
    *,
    grow: Criterion,
) -> Bool[Array, "*shape"]:
    """Drop the worst of the live weights, then grow the best of all the others.

    What was just dropped may grow again. If fewer than ``keep - moved`` are live, all
    of them stay and more are grown.
    """
    live = jnp.sum(mask)
    stay = jnp.minimum(rule.keep - rule.moved, live)
    kept = rule.structure(_among(mask, rule.criterion(seen)), stay)
    return kept | rule.structure(_among(~kept, grow(seen)), rule.keep - stay)


def prune(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Keep the best of the live weights; what is dead stays dead.

    Only when the schedule asks for more than are live do others come back.
    """
    return prune_and_grow(mask, seen, rule._replace(moved=0), grow=rule.criterion)


def select(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Keep the best of all weights, whatever the mask was: pruning can be undone."""
    return prune(jnp.ones_like(mask), seen, rule)


def set_(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Grow anywhere, at random.

    Source: Mocanu et al. 2018, arXiv:1707.04780, Alg. 1. Departure: drops by size, not
    sign by sign, and what grows starts at 0.
    """
    return prune_and_grow(mask, seen, rule, grow=random)


def rigl(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Grow where the gradient of the loss is largest.

    Source: Evci et al. 2019, arXiv:1911.11134, Alg. 1. Departure: no noise is added to
    the sizes, ties go to the lower index.
    """
    return prune_and_grow(mask, seen, rule, grow=gradient)


def static(
    mask: Bool[Array, "*shape"],
    seen: Evidence,  # noqa: ARG001
    rule: Rule,  # noqa: ARG001
) -> Bool[Array, "*shape"]:
    """Keep the mask that training began with."""
    return mask


def _among(
    eligible: Bool[Array, "*shape"], scores: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Put everything else below the worst that is eligible, NaN included."""
    limit = jnp.finfo(scores.dtype).max
    finite = jnp.nan_to_num(scores, nan=-limit, posinf=limit, neginf=-limit)
    return jnp.where(eligible, finite, -jnp.inf)
