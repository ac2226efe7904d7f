"""Dispatch: carry tokens to their experts and the weighted answers back.

A dispatcher is ``(x, chosen, weights, experts, *, activation) -> y`` in float32, on the
experts at hand; ``chosen == e``, one past the last expert, marks a slot to skip, which
gets no answer and no gradient. All dispatchers agree: ``dense`` is the oracle,
``grouped`` does only the work asked for, ``capacity`` works on buffers of that many
rows and drops what does not fit. ``exchange`` runs one over a device mesh. Slots are
numbered choice by choice: all first choices come before any second.
"""

import inspect
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sparsejax.config import near
from sparsejax.moe.experts import ACTIVATIONS, GatedExperts, batched, grouped
from sparsejax.moe.routers import Routing
from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "DISPATCHERS",
    "apply_experts",
    "by_capacity",
    "by_group",
    "capacity_of",
    "densely",
    "dispatch_of",
    "exchange",
    "has_buffers",
    "limited",
]

Dispatcher = Callable[..., Array]
Activation = Callable[[Array], Array]

# Expert and slot are sorted as one int32, which is fast, as long as they fit.
_PACKED = 2**31


class _Order(NamedTuple):
    """Slots sorted by expert; skipped ones last."""

    slots: Int[Array, " m"]  # the slot at each sorted place
    places: Int[Array, " m"]  # the sorted place of each slot
    sizes: Int[Array, " e"]  # slots of each expert
    keys: Int[Array, " m"]  # the expert of each slot


def _sort(chosen: Int[Array, "n k"], experts: int) -> _Order:
    keys = chosen.T.reshape(-1)
    count = keys.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    bits = max(count - 1, 1).bit_length()
    if (experts + 1) << bits <= _PACKED:
        slots = jnp.sort((keys << bits) | number) & (2**bits - 1)
    else:
        slots = jnp.argsort(keys, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(slots).at[slots].set(number, unique_indices=True)
    bounds = jnp.searchsorted(keys[slots], jnp.arange(experts + 1, dtype=jnp.int32))
    order = _Order(slots, places, jnp.diff(bounds).astype(jnp.int32), keys)
    # Few bytes and a sort to compute: worth keeping under rematerialisation.
    return _Order(*(checkpoint_name(a, "routed") for a in order))


def _ranks(order: _Order) -> Int[Array, " m"]:
    """Say how many slots of the same expert come before each slot."""
    starts = jnp.cumsum(order.sizes) - order.sizes
    last = order.sizes.shape[0] - 1
    return order.places - starts[jnp.minimum(order.keys, last)]


@jax.custom_vjp
def _take(
    x: Float[Array, "n d"], source: Int[Array, " m"], uses: Int[Array, "k n"]
) -> Float[Array, "m d"]:
    """Take rows of ``x``; a source past the last gives a row of zeros.

    Args:
        source: the row of ``x`` behind each row of the result.
        uses: the inverse, the rows of the result that come from each row of ``x``, or
            any number past the last. It makes the gradient a gather as well.
    """
    del uses
    return x.at[source].get(mode="fill", fill_value=0)


def _take_forward(x: Array, source: Array, uses: Array) -> tuple[Array, Array]:
    return _take(x, source, uses), uses


def _take_backward(uses: Array, dy: Array) -> tuple[Array, None, None]:
    rows = dy.at[uses].get(mode="fill", fill_value=0)
    return rows.sum(axis=0, dtype=jnp.float32).astype(dy.dtype), None, None


_take.defvjp(_take_forward, _take_backward)


def _combine(
    y: Float[Array, "m d"], weights: Float[Array, "n k"], skipped: Bool[Array, "n k"]
) -> Float[Array, "n d"]:
    """Sum the weighted answers of the slots, in float32."""
    w = jnp.where(skipped, 0, weights).T[..., None]
    return (y.reshape(*w.shape[:2], -1).astype(jnp.float32) * w).sum(axis=0)


def densely(
    x: Float[Array, "n d"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    experts: GatedExperts,
    *,
    activation: Activation,
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
    activation: Activation,
) -> Float[Array, "n d"]:
    """Sort the slots by expert and multiply group by group; nothing is dropped.

    Source: Gale et al. 2022, arXiv:2211.15841, Sec. 4. Departure: groups are not padded
    to blocks.
    """
    count = experts.up.shape[0]
    order = _sort(chosen, count)
    rows = _take(x, order.slots % x.shape[0], order.places.reshape(chosen.T.shape))
    y = grouped(rows, experts, order.sizes, activation=activation)
    y = _take(y, order.places, order.slots[None])
    return _combine(y, weights, chosen == count)


def by_capacity(
    x: Float[Array, "n d"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    experts: GatedExperts,
    *,
    activation: Activation,
    capacity: int,
) -> Float[Array, "n d"]:
    """Give each expert a buffer of ``capacity`` rows; later slots are dropped.

    Source: Lepikhin et al. 2020, arXiv:2006.16668, Alg. 1. Departure: rows are
    gathered, not multiplied by a one-hot mask.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a buffer has at least one row")
    count, (tokens, k) = experts.up.shape[0], chosen.shape
    order = _sort(chosen, count)
    rank = _ranks(order)
    kept = (order.keys < count) & (rank < capacity)
    cell = jnp.where(kept, order.keys * capacity + rank, count * capacity)
    slot = jnp.full_like(cell, tokens * k, shape=(count * capacity,))
    slot = slot.at[cell].set(jnp.arange(tokens * k, dtype=jnp.int32), mode="drop")
    source = jnp.where(slot < tokens * k, slot % tokens, tokens)
    rows = _take(x, source, cell.reshape(k, tokens))
    rows = rows.reshape(count, capacity, -1)
    y = batched(rows, experts, activation=activation)
    y = _take(y.reshape(count * capacity, -1), cell, slot[None])
    return _combine(y, weights, ~kept.reshape(k, tokens).T)


def capacity_of(*, tokens: int, experts: int, per_token: int, factor: float) -> int:
    """Give the rows of an expert's buffer: the balanced load times ``factor``, up.

    A token visits an expert at most once, so it is never more than the tokens.

    Raises:
        ValueError: unless the factor is positive.
    """
    if factor <= 0:
        raise ValueError(f"factor={factor}: a capacity below one row; must be positive")
    load = Fraction(str(factor)) * tokens * per_token / experts
    return max(1, min(tokens, -(-load.numerator // load.denominator)))


def limited(routing: Routing, capacity: int) -> Routing:
    """Drop what is past each expert's first ``capacity`` slots, by setting weight 0.

    First choices come before second ones, and then earlier tokens before later ones.

    Raises:
        ValueError: if the capacity is below one.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: must be at least one row for an expert")
    experts = routing.probs.shape[1]
    chosen = jnp.where(routing.weights != 0, routing.experts, experts)
    rank = _ranks(_sort(chosen, experts)).reshape(chosen.T.shape).T
    return routing._replace(weights=jnp.where(rank < capacity, routing.weights, 0))


def exchange(
    dispatch: Dispatcher,
    x: Float[Array, "n d"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    experts: GatedExperts,
    *,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
) -> Float[Array, "n d"]:
    """Run a dispatcher on one device's tokens and experts, inside ``shard_map``.

    Tokens of all devices along ``expert_axis`` are gathered, each device applies the
    experts it holds, and the sums go back to where the tokens came from. Along
    ``tensor_axis`` each device holds a part of every expert's hidden width.
    """
    if expert_axis is not None:
        x, chosen, weights = (
            lax.all_gather(a, expert_axis, tiled=True) for a in (x, chosen, weights)
        )
    count = experts.up.shape[0]
    first = 0 if expert_axis is None else lax.axis_index(expert_axis) * count
    here = (chosen >= first) & (chosen < first + count) & (weights != 0)
    local = jnp.where(here, chosen - first, count)
    experts = jax.tree.map(lambda w: w.astype(x.dtype), experts)
    y = dispatch(x, local, weights, experts)
    if expert_axis is not None:
        y = lax.psum_scatter(y, expert_axis, tiled=True)
    if tensor_axis is not None:
        y = lax.psum(y, tensor_axis)
    return y.astype(x.dtype)


def apply_experts(
    x: Float[Array, "n d"],
    routing: Routing,
    experts: GatedExperts,
    *,
    dispatcher: str = "grouped",
    activation: str = "silu",
    capacity: int | None = None,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
) -> Float[Array, "n d"]:
    """Give each token the weighted sum of the answers of its experts.

    Args:
        x: tokens; with a mesh axis named, those of this device.
        routing: ids count over all experts, weights of 0 are skipped.
        experts: weights; with a mesh axis named, those of this device.
        dispatcher: a name of ``DISPATCHERS``.
        activation: a name of ``ACTIVATIONS``.
        capacity: rows for each expert, for the capacity dispatcher only. To drop under
            any other, and to count the drops, pass the routing through ``limited``.
        expert_axis: mesh axis over which experts and tokens are divided.
        tensor_axis: mesh axis over which the hidden width is divided.

    Raises:
        ValueError: for a name that does not exist, or a capacity missing or unused.
    """
    dispatch = dispatch_of(dispatcher, activation=activation, capacity=capacity)
    return exchange(
        dispatch,
        x,
        routing.experts,
        routing.weights,
        experts,
        expert_axis=expert_axis,
        tensor_axis=tensor_axis,
    )


def dispatch_of(name: str, *, activation: str, capacity: int | None) -> Dispatcher:
    """Look up a dispatcher and fix its settings.

    Raises:
        ValueError: for a name that does not exist, or a capacity missing or unused.
    """
    for field, value, table in (
        ("dispatcher", name, DISPATCHERS),
        ("activation", activation, ACTIVATIONS),
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
    settings = {} if capacity is None else {"capacity": capacity}
    return partial(DISPATCHERS[name], activation=ACTIVATIONS[activation], **settings)


def has_buffers(name: str) -> bool:
    """Say whether a dispatcher works on buffers, whose rows it must be told."""
    return "capacity" in inspect.signature(DISPATCHERS[name]).parameters


DISPATCHERS: dict[str, Dispatcher] = {
    "dense": densely,
    "grouped": by_group,
    "capacity": by_capacity,
}
