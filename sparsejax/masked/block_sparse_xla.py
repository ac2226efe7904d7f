"""Products with live blocks as loops over them, for CPUs above all.

Loops with traced trip counts: the work follows the live blocks. Tiles of rows are on
the outside, so that the sum of a column of blocks stays in a core's cache while its
blocks are added up.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax.masked.block_sparse_gradient import Lists, differentiable
from sparsejax.typing import Array

__all__ = ["xla"]

TALL = 1024  # rows of a tile: its products run in parallel, its sums fit a cache


def _rows_by_weights(
    x: Array, values: Array, own: Array, other: Array, count: int, *, turned: bool
) -> Array:
    lists = Lists.of(own, count)
    inner, outer = values.shape[1:][:: -1 if turned else 1]

    def tile(x: Array) -> Array:
        def block(n: Array, total: Array) -> Array:
            entry = lists.order[n]
            weight = lax.dynamic_index_in_dim(values, entry, keepdims=False)
            part = lax.dynamic_slice_in_dim(x, other[entry] * inner, inner, axis=1)
            return total + _dot(part, weight, 1, 1 if turned else 0)

        def column(j: Array, y: Array) -> Array:
            zeros = jnp.zeros_like(x, shape=(x.shape[0], outer), dtype=jnp.float32)
            total = lax.fori_loop(lists.start[j], lists.start[j + 1], block, zeros)
            return lax.dynamic_update_slice_in_dim(
                y, total.astype(y.dtype), j * outer, axis=1
            )

        y = jnp.zeros_like(x, shape=(x.shape[0], count * outer))
        return lax.fori_loop(0, count, column, y)

    y = lax.map(tile, _tiles(x))
    return y.reshape(-1, y.shape[2])[: x.shape[0]]


def _rows_by_rows(
    x: Array, dy: Array, rows: Array, columns: Array, grid: tuple[int, int]
) -> Array:
    lists = Lists.of(rows, grid[0])
    tall, wide = (a.shape[1] // n for a, n in zip((x, dy), grid, strict=True))

    def tile(total: Array, rows_of: tuple[Array, Array]) -> tuple[Array, None]:
        def block(n: Array, total: Array) -> Array:
            entry = lists.order[n]
            a = lax.dynamic_slice_in_dim(rows_of[0], rows[entry] * tall, tall, axis=1)
            b = lax.dynamic_slice_in_dim(
                rows_of[1], columns[entry] * wide, wide, axis=1
            )
            sums = lax.dynamic_index_in_dim(total, entry, keepdims=False)
            return lax.dynamic_update_index_in_dim(
                total, sums + _dot(a, b, 0, 0), entry, axis=0
            )

        return lax.fori_loop(0, lists.start[-1], block, total), None

    shape = (rows.shape[0], tall, wide)
    zeros = jnp.zeros_like(x, shape=shape, dtype=jnp.float32)
    total, _ = lax.scan(tile, zeros, (_tiles(x), _tiles(dy)))
    return total.astype(x.dtype)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _tiles(x: Array) -> Array:
    """Cut rows into equal tiles, the last of which may end in zeros."""
    count = -(-x.shape[0] // TALL)
    tall = -(-x.shape[0] // count)
    missing = count * tall - x.shape[0]
    x = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    return x.reshape(count, tall, x.shape[1])


xla = differentiable(_rows_by_weights, _rows_by_rows)
