"""Products with live blocks as loops over them, for CPUs above all.

Loops with traced trip counts: the work follows the live blocks, a product each. Tiles
of rows are on the outside, and tall: a product of few rows costs more to start.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax.masked.block_sparse_gradient import Lists, differentiable, filled
from sparsejax.typing import Array

__all__ = ["xla"]

TALL = 2048  # rows of a tile: on two cores 256 takes a tenth to a quarter longer


def _rows_by_weights(
    x: Array, values: Array, own: Array, other: Array, count: int, *, turned: bool
) -> Array:
    lists, rows, tall = Lists.of(own, count), x.shape[0], _tall(x.shape[0])
    x = filled(x, tall)
    inner, outer = values.shape[1:][:: -1 if turned else 1]

    def tile(i: Array, y: Array) -> Array:
        def block(n: Array, total: Array) -> Array:
            entry = lists.order[n]
            weight = lax.dynamic_index_in_dim(values, entry, keepdims=False)
            part = lax.dynamic_slice(x, (i * tall, other[entry] * inner), (tall, inner))
            return total + _dot(part, weight, 1, 1 if turned else 0)

        def column(j: Array, y: Array) -> Array:
            zeros = jnp.zeros_like(x, shape=(tall, outer), dtype=jnp.float32)
            total = lax.fori_loop(lists.start[j], lists.start[j + 1], block, zeros)
            return lax.dynamic_update_slice(
                y, total.astype(y.dtype), (i * tall, j * outer)
            )

        return lax.fori_loop(0, count, column, y)

    y = jnp.zeros_like(x, shape=(x.shape[0], count * outer))
    return lax.fori_loop(0, x.shape[0] // tall, tile, y)[:rows]


def _rows_by_rows(
    x: Array, dy: Array, rows: Array, columns: Array, grid: tuple[int, int]
) -> Array:
    lists, tall = Lists.of(rows, grid[0]), _tall(x.shape[0])
    x, dy = filled(x, tall), filled(dy, tall)
    high, wide = (a.shape[1] // n for a, n in zip((x, dy), grid, strict=True))

    def tile(i: Array, total: Array) -> Array:
        def block(n: Array, total: Array) -> Array:
            entry = lists.order[n]
            a = lax.dynamic_slice(x, (i * tall, rows[entry] * high), (tall, high))
            b = lax.dynamic_slice(dy, (i * tall, columns[entry] * wide), (tall, wide))
            sums = lax.dynamic_index_in_dim(total, entry, keepdims=False)
            return lax.dynamic_update_index_in_dim(
                total, sums + _dot(a, b, 0, 0), entry, axis=0
            )

        return lax.fori_loop(0, lists.start[-1], block, total)

    shape = (rows.shape[0], high, wide)
    total = jnp.zeros_like(x, shape=shape, dtype=jnp.float32)
    return lax.fori_loop(0, x.shape[0] // tall, tile, total).astype(x.dtype)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _tall(rows: int) -> int:
    """Cut rows into equal tiles."""
    return -(-rows // -(-rows // TALL))


xla = differentiable(_rows_by_weights, _rows_by_rows)
