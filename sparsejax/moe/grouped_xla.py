"""Grouped products as loops over tiles of rows, for CPUs above all.

A loop inside a loop, both with traced trip counts: the work follows the rows, and the
products run at the speed of dense ones.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax

from sparsejax.moe.grouped_gradient import differentiable
from sparsejax.typing import Array

__all__ = ["xla"]

# A group is cut in tiles of the last size, and its rest is one of the smallest size
# that holds it: wide tiles run at the speed of a dense product, and each more would
# read the weight, or add to its gradient, once more.
TILES = (32, 64, 128)


def _rows_by_weights(x: Array, w: Array, group_sizes: Array, *, contract: int) -> Array:
    """Multiply rows by their group's weight, contracting that axis of the weight."""
    ends = jnp.cumsum(group_sizes)

    def group(g: Array, y: Array) -> Array:
        weight = lax.dynamic_index_in_dim(w, g, keepdims=False)

        def tile(start: Array, live: Array, y: Array) -> Array:
            size = live.shape[0]
            rows = lax.dynamic_slice_in_dim(x, start, size)
            part = _dot(rows, weight, 1, contract).astype(x.dtype)
            part = jnp.where(live, part, lax.dynamic_slice_in_dim(y, start, size))
            return lax.dynamic_update_slice_in_dim(y, part, start, 0)

        return _over_tiles(tile, ends[g] - group_sizes[g], ends[g], x.shape[0], y)

    y = jnp.zeros_like(x, shape=(x.shape[0], w.shape[2 - contract]))
    return _over_groups(group, group_sizes, y)


def _rows_by_rows(x: Array, dy: Array, group_sizes: Array) -> Array:
    """Give ``x.T @ dy`` of each group; zeros for an empty one."""
    ends = jnp.cumsum(group_sizes)

    def group(g: Array, sums: Array) -> Array:
        def tile(start: Array, live: Array, total: Array) -> Array:
            rows, rows_dy = (
                jnp.where(live, lax.dynamic_slice_in_dim(a, start, live.shape[0]), 0)
                for a in (x, dy)
            )
            return total + _dot(rows, rows_dy, 0, 0)

        shape = (x.shape[1], dy.shape[1])
        total = jnp.zeros_like(x, shape=shape, dtype=jnp.float32)
        start = ends[g] - group_sizes[g]
        total = _over_tiles(tile, start, ends[g], x.shape[0], total)
        return lax.dynamic_update_index_in_dim(sums, total.astype(x.dtype), g, 0)

    shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])
    return _over_groups(group, group_sizes, jnp.zeros_like(x, shape=shape))


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _over_groups(
    group: Callable[[Array, Array], Array], group_sizes: Array, carry: Array
) -> Array:
    """Fold ``group(number, carry)`` over the groups that have rows.

    An empty one would read a weight, or write one, for nothing.
    """

    def step(g: Array, carry: Array) -> Array:
        return lax.cond(group_sizes[g] > 0, group, lambda _, carry: carry, g, carry)

    return lax.fori_loop(0, group_sizes.shape[0], step, carry)


def _over_tiles(
    tile: Callable[..., Array], start: Array, end: Array, rows: int, carry: Array
) -> Array:
    """Fold ``tile(first_row, live, carry)`` over the rows from ``start`` to ``end``.

    Every row of the group is live in exactly one tile. A last tile may reach past its
    group, or begin before it where it would reach past the array: those rows are dead.
    """
    sizes = sorted({min(size, rows) for size in TILES})
    whole = (end - start) // sizes[-1]
    rest = start + whole * sizes[-1]

    def fold(size: int, wanted: Array, carry: Array) -> Array:
        first = jnp.minimum(wanted, rows - size)
        row = first + lax.iota(jnp.int32, size)
        live = (row >= wanted) & (row < end)
        return tile(first, live[:, None], carry)

    def step(i: Array, carry: Array) -> Array:
        return fold(sizes[-1], start + i * sizes[-1], carry)

    carry = lax.fori_loop(0, whole, step, carry)
    held = [lambda carry: carry, *(partial(fold, size, rest) for size in sizes)]
    which = sum((end - rest > size).astype(jnp.int32) for size in (0, *sizes[:-1]))
    return lax.switch(which, held, carry)


xla = differentiable(_rows_by_weights, _rows_by_rows)
