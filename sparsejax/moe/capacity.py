"""Capacity: how many rows an expert takes, and which visits fill them.

A capacity is an integer, computed in integers. ``ROUNDINGS`` say how a share becomes
one, ``PRIORITIES`` which visits come first; what comes too late is dropped by giving it
the weight 0. ``Cause`` names where a visit was lost, ``drop_shares`` counts each.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from fractions import Fraction

import jax
import jax.numpy as jnp

from sparsejax.config import near
from sparsejax.moe.order import ranks, sort
from sparsejax.moe.routers import Routing
from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "PRIORITIES",
    "ROUNDINGS",
    "Cause",
    "arrivals",
    "by_position",
    "by_score",
    "capacity_of",
    "drop_shares",
    "limited",
    "rows_of",
]


class Cause(IntEnum):
    """Why a visit did not happen."""

    NONE = 0  # it did, or was never asked for
    CAPACITY = 1  # its expert had its rows, before anything was sent
    SENDER = 2  # the buffer from its device to its expert's was full
    RECEIVER = 3  # it was sent, and found the expert's device full


def _up(share: Fraction) -> int:
    return math.ceil(share)


def _down(share: Fraction) -> int:
    return math.floor(share)


def _nearest(share: Fraction) -> int:
    return math.floor(share + Fraction(1, 2))


ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "up": _up,
    "down": _down,
    "nearest": _nearest,
}


def capacity_of(
    *, tokens: int, experts: int, per_token: int, factor: float, rounding: str = "up"
) -> int:
    """Give the rows of an expert's buffer: the balanced load times ``factor``.

    A token visits an expert at most once, so it is never more than the tokens; it is
    never less than one either.

    Args:
        rounding: a name of ``ROUNDINGS``; "nearest" rounds a half up.

    Raises:
        ValueError: unless the factor is positive and the rounding exists.
    """
    rows = rows_of(
        slots=tokens * per_token, targets=experts, factor=factor, rounding=rounding
    )
    return min(tokens, rows)


def rows_of(*, slots: int, targets: int, factor: float, rounding: str = "up") -> int:
    """Give the rows of each target's buffer: the mean load times ``factor``.

    It is at least one and at most all ``slots``.

    Raises:
        ValueError: unless the factor is positive and the rounding exists.
    """
    if factor <= 0:
        raise ValueError(f"factor={factor}: a capacity below one row; must be positive")
    _known("rounding", rounding, ROUNDINGS)
    share = Fraction(str(factor)) * slots / targets
    return max(1, min(slots, ROUNDINGS[rounding](share)))


def by_position(
    chosen: Int[Array, "n k"], weights: Float[Array, "n k"], targets: int
) -> Int[Array, "n k"]:
    """First choices before second ones, and then earlier tokens before later ones."""
    del weights
    return ranks(sort(chosen, targets)).reshape(chosen.T.shape).T


def by_score(
    chosen: Int[Array, "n k"], weights: Float[Array, "n k"], targets: int
) -> Int[Array, "n k"]:
    """First choices before second ones, and then surer tokens before less sure ones.

    A token is as sure as the largest of its weights; ties go to the earlier token.

    Source: Riquelme et al. 2021, arXiv:2106.05974, Sec. 4.1.
    """
    score = jax.lax.stop_gradient(weights).max(axis=1)
    first = jnp.argsort(-score, stable=True).astype(jnp.int32)
    rank = by_position(chosen[first], weights, targets)
    return jnp.zeros_like(rank).at[first].set(rank, unique_indices=True)


def by_token(
    chosen: Int[Array, "n k"], weights: Float[Array, "n k"], targets: int
) -> Int[Array, "n k"]:
    """Earlier tokens, with all their choices, before later ones: none looks ahead."""
    del weights
    return ranks(sort(chosen.reshape(-1, 1), targets)).reshape(chosen.shape)


# Count, for each slot, the slots with the same target that are served before it.
PRIORITIES: dict[str, Callable[[Array, Array, int], Array]] = {
    "position": by_position,
    "score": by_score,
    "token": by_token,
}


def arrivals(
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    *,
    targets: int,
    priority: str,
) -> Int[Array, "n k"]:
    """Count, for each slot, the slots with the same target that are served before it.

    Args:
        chosen: the target of each slot; ``targets`` marks one to skip.
        priority: a name of ``PRIORITIES``.
    """
    _known("priority", priority, PRIORITIES)
    return PRIORITIES[priority](chosen, weights, targets)


def limited(routing: Routing, capacity: int, *, priority: str = "position") -> Routing:
    """Drop what is past each expert's first ``capacity`` slots, by setting weight 0.

    Args:
        priority: a name of ``PRIORITIES``: which slots come first.

    Raises:
        ValueError: if the capacity is below one, or there is no such priority.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: must be at least one row for an expert")
    experts = routing.probs.shape[1]
    chosen = jnp.where(routing.weights != 0, routing.experts, experts)
    rank = arrivals(chosen, routing.weights, targets=experts, priority=priority)
    return routing._replace(weights=jnp.where(rank < capacity, routing.weights, 0))


def drop_shares(
    routing: Routing,
    causes: Int[Array, "n k"],
    *,
    valid: Bool[Array, " n"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Give the share of all visits asked for that was lost to each cause."""
    asked = routing.weights != 0
    if valid is not None:
        asked &= valid[:, None]
    total = jnp.maximum(asked.sum(), 1)
    return {
        f"dropped_{cause.name.lower()}": (asked & (causes == cause)).sum() / total
        for cause in Cause
        if cause != Cause.NONE
    }


def _known(field: str, name: str, table: dict[str, Callable]) -> None:
    if name not in table:
        raise ValueError(f"{field}={name!r}: no such name{near(name, table)}")
