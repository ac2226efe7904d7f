"""Order: slots sorted by where they go, and rows moved there and back.

A slot is one choice of one token, ``chosen[n, k]``. Slots are numbered choice by
choice: all first choices come before any second. Moving rows is a gather, and so is its
gradient, since whoever sorts knows the inverse.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "Buffers",
    "Order",
    "buffers",
    "combine",
    "inverse",
    "owners",
    "ranks",
    "sort",
    "take",
]

# Target and slot are sorted as one int32, which is fast, as long as they fit.
PACKED = 2**31


class Order(NamedTuple):
    """Slots sorted by target; skipped ones last."""

    slots: Int[Array, " m"]  # the slot at each sorted place
    places: Int[Array, " m"]  # the sorted place of each slot
    sizes: Int[Array, " e"]  # slots of each target
    keys: Int[Array, " m"]  # the target of each slot


def sort(chosen: Int[Array, "n k"], targets: int) -> Order:
    """Sort the slots by target, stably; ``chosen == targets`` marks one to skip."""
    keys = chosen.T.reshape(-1)
    count = keys.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    bits = max(count - 1, 1).bit_length()
    if (targets + 1) << bits <= PACKED:
        slots = jnp.sort((keys << bits) | number) & (2**bits - 1)
    else:
        slots = jnp.argsort(keys, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(slots).at[slots].set(number, unique_indices=True)
    bounds = jnp.searchsorted(keys[slots], jnp.arange(targets + 1, dtype=jnp.int32))
    order = Order(slots, places, jnp.diff(bounds).astype(jnp.int32), keys)
    # Few bytes and a sort to compute: worth keeping under rematerialisation.
    return Order(*(checkpoint_name(a, "routed") for a in order))


def ranks(order: Order) -> Int[Array, " m"]:
    """Say how many slots of the same target come before each slot."""
    starts = jnp.cumsum(order.sizes) - order.sizes
    last = order.sizes.shape[0] - 1
    return order.places - starts[jnp.minimum(order.keys, last)]


class Buffers(NamedTuple):
    """Slots laid out in one buffer of equally many rows for each target."""

    slots: Int[Array, " m"]  # the slot in each row; past the last slot, none
    rows: Int[Array, "k n"]  # the row of each slot; past the last row, none
    kept: Bool[Array, "n k"]  # whether the slot has a row


def buffers(
    chosen: Int[Array, "n k"], rank: Int[Array, "n k"], *, targets: int, capacity: int
) -> Buffers:
    """Give the slots of rank below ``capacity`` a row in their target's buffer."""
    kept = (chosen < targets) & (rank < capacity)
    rows = jnp.where(kept, chosen * capacity + rank, targets * capacity).T
    return Buffers(inverse(rows.reshape(-1), targets * capacity), rows, kept)


def inverse(rows: Int[Array, " m"], count: int) -> Int[Array, " q"]:
    """Give the slot in each of ``count`` rows; past the last slot, none."""
    slots = jnp.full_like(rows, rows.shape[0], shape=(count,))
    number = jnp.arange(rows.shape[0], dtype=rows.dtype)
    return slots.at[rows].set(number, mode="drop", unique_indices=True)


def owners(slots: Int[Array, " m"], chosen: Int[Array, "n k"]) -> Int[Array, " m"]:
    """Give the token behind each slot; past the last token, none."""
    return jnp.where(slots < chosen.size, slots % chosen.shape[0], chosen.shape[0])


@jax.custom_vjp
def take(
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
    # Not take, which has no forward mode: curvature is that of a gradient.
    return x.at[source].get(mode="fill", fill_value=0), uses


def _take_backward(uses: Array, dy: Array) -> tuple[Array, None, None]:
    rows = dy.at[uses].get(mode="fill", fill_value=0)
    return rows.sum(axis=0, dtype=jnp.float32).astype(dy.dtype), None, None


take.defvjp(_take_forward, _take_backward)


def combine(
    y: Float[Array, "m d"], weights: Float[Array, "n k"], skipped: Bool[Array, "n k"]
) -> Float[Array, "n d"]:
    """Sum the weighted answers of the slots, in float32."""
    w = jnp.where(skipped, 0, weights).T[..., None]
    return (y.reshape(*w.shape[:2], -1).astype(jnp.float32) * w).sum(axis=0)
