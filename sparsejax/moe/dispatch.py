"""Dispatch: carry tokens to their experts and the weighted answers back.

A dispatcher is ``(x, chosen, weights, experts, *, activation) -> y`` in float32, on the
experts at hand; ``chosen == e``, one past the last expert, marks a slot to skip, which
gets no answer and no gradient. All dispatchers agree: ``dense`` is the oracle,
``grouped`` does only the work asked for, ``capacity`` works on buffers of that many
rows and drops what does not fit. ``exchange`` runs one over a device mesh.
"""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sparsejax.config import near
from sparsejax.moe.capacity import arrivals
from sparsejax.moe.experts import HIDDEN, GatedExperts, Hidden, batched, grouped
from sparsejax.moe.order import buffers, combine, owners, sort, take
from sparsejax.typing import Array, Float, Int

__all__ = [
    "DISPATCHERS",
    "Dispatcher",
    "by_capacity",
    "by_group",
    "densely",
    "dispatch_of",
    "has_buffers",
    "has_groups",
]

Dispatcher = Callable[..., Array]


def densely(
    x: Float[Array, "n d"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    experts: GatedExperts,
    *,
    activation: Hidden,
) -> Float[Array, "n d"]:
    """Send every token to every expert, and weigh most answers by zero."""
    count = experts.up.shape[0]
    visits = jax.nn.one_hot(chosen, count, dtype=jnp.float32)
    share = (weights[..., None] * visits).sum(axis=1)
    everywhere = jnp.broadcast_to(x[None], (count, *x.shape))
    y = batched(everywhere, experts, activation=activation).astype(jnp.float32)
    return jnp.einsum("ne,end->nd", share, y)


def by_group(
    x: Float[Array, "n d"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    experts: GatedExperts,
    *,
    activation: Hidden,
    implementation: str | None = None,
    most: int | None = None,
) -> Float[Array, "n d"]:
    """Sort the slots by expert and multiply group by group; nothing is dropped.

    Args:
        implementation: of the products, a name of ``grouped.IMPLEMENTATIONS``.
        most: visits that no expert gets more of; None: as many as there are tokens.
            Where tokens have many slots, and few are used, that is fewer rows.

    Source: Gale et al. 2022, arXiv:2211.15841, Sec. 4. Departure: groups are not padded
    to blocks.
    """
    count = experts.up.shape[0]
    order = sort(chosen, count)
    bound = chosen.size if most is None else min(chosen.size, count * most)
    slots = order.slots[:bound]  # those in use come first
    rows = take(x, slots % x.shape[0], order.places.reshape(chosen.T.shape))
    y = grouped(
        rows,
        experts,
        order.sizes,
        activation=activation,
        implementation=implementation,
    )
    y = take(y, order.places, slots[None])
    return combine(y, weights, chosen == count)


def by_capacity(
    x: Float[Array, "n d"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    experts: GatedExperts,
    *,
    activation: Hidden,
    capacity: int,
    priority: str = "position",
) -> Float[Array, "n d"]:
    """Give each expert a buffer of ``capacity`` rows; later slots are dropped.

    Args:
        priority: a name of ``PRIORITIES``: which slots come first.

    Source: Lepikhin et al. 2020, arXiv:2006.16668, Alg. 1. Departure: rows are
    gathered, not multiplied by a one-hot mask.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a buffer has at least one row")
    count = experts.up.shape[0]
    rank = arrivals(chosen, weights, targets=count, priority=priority)
    slots, rows, kept = buffers(chosen, rank, targets=count, capacity=capacity)
    held = take(x, owners(slots, chosen), rows).reshape(count, capacity, -1)
    y = batched(held, experts, activation=activation).reshape(count * capacity, -1)
    y = take(y, rows.reshape(-1), slots[None])
    return combine(y, weights, ~kept)


def dispatch_of(
    name: str,
    *,
    activation: str,
    capacity: int | None,
    implementation: str | None = None,
    most: int | None = None,
) -> Dispatcher:
    """Look up a dispatcher and fix its settings.

    Raises:
        ValueError: for a name that does not exist, a capacity missing or unused, or an
            implementation of products that the dispatcher does not do.
    """
    for field, value, table in (
        ("dispatcher", name, DISPATCHERS),
        ("activation", activation, HIDDEN),
    ):
        if value not in table:
            raise ValueError(f"{field}={value!r}: no such name{near(value, table)}")
    if has_buffers(name) and capacity is None:
        raise ValueError(
            f"capacity=None: dispatcher {name!r} needs the number of rows of a buffer"
        )
    if not has_buffers(name) and capacity is not None:
        raise ValueError(
            f"capacity={capacity}: dispatcher {name!r} has no buffers; drop with"
            " limited(routing, capacity) instead"
        )
    if implementation is not None and not has_groups(name):
        raise ValueError(
            f"implementation={implementation!r}: dispatcher {name!r} has no grouped"
            " products; leave it none"
        )
    given = {"capacity": capacity, "implementation": implementation}
    given |= {"most": most} if has_groups(name) else {}
    settings = {name: value for name, value in given.items() if value is not None}
    return partial(DISPATCHERS[name], activation=HIDDEN[activation], **settings)


def has_buffers(name: str) -> bool:
    """Say whether a dispatcher works on buffers, whose rows it must be told."""
    return "capacity" in inspect.signature(DISPATCHERS[name]).parameters


def has_groups(name: str) -> bool:
    """Say whether a dispatcher multiplies group by group."""
    return "implementation" in inspect.signature(DISPATCHERS[name]).parameters


DISPATCHERS: dict[str, Dispatcher] = {
    "dense": densely,
    "grouped": by_group,
    "capacity": by_capacity,
}
