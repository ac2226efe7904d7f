"""Products with live blocks on TPUs, by the kernels of ``pallas_kernels.tpu``.

A grid step multiplies a tile of rows by one block. Blocks of 128 or more, on both
sides, fill the matrix unit and are cut out of rows as they lie; narrower ones are
copied apart first.
"""

import jax.numpy as jnp

from pallas_kernels import KernelError
from pallas_kernels.tpu.block_sparse import Side, rows_by_blocks, rows_by_rows
from pallas_kernels.tpu.interpreter import needs_tpu
from sparsejax.masked.block_sparse_gradient import Lists, differentiable, filled
from sparsejax.partition import platform
from sparsejax.typing import Array

__all__ = ["mosaic_tpu"]

LANES = 128
SUBLANES = 16  # of 16-bit numbers; a multiple of those of 32-bit ones
WIDEST = 1024  # side of a block
TILE = 2048 * 128  # elements of a tile of rows: tall ones amortise a step of the grid


def mosaic_tpu(
    x: Array, values: Array, rows: Array, columns: Array, grid: tuple[int, int]
) -> Array:
    """Tiles of the matrix unit, accumulated in float32.

    Raises:
        KernelError: where there is no TPU, and for dtypes or blocks that are not for
            these kernels.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise KernelError(
            f"implementation='mosaic_tpu' with {x.dtype}: TPU kernels compute in"
            " bfloat16 and float32; cast x and the weight to one"
        )
    if max(values.shape[1:]) > WIDEST:
        raise KernelError(
            f"implementation='mosaic_tpu' with blocks of {values.shape[1:]}: sides of"
            f" up to {WIDEST} fit the chip; cut the weight into smaller blocks"
        )
    needs_tpu(platform())
    return _product(x, values, rows, columns, grid)


def _tile(rows: int, sides: tuple[int, ...]) -> int:
    tall = max(TILE // max(LANES, *sides), SUBLANES)
    return min(tall, -(-rows // SUBLANES) * SUBLANES)


def _side(blocks: int, size: int) -> Side:
    return Side(blocks, size, split=size % LANES != 0)


def _laid_out(x: Array, side: Side, tile: int) -> Array:
    """Give rows as the kernels read them, filled up with zeros to whole tiles."""
    x = filled(x, tile)
    if not side.split:
        return x[None]
    return x.reshape(x.shape[0], side.blocks, side.size).swapaxes(0, 1)


def _rows_by_weights(
    x: Array, values: Array, own: Array, other: Array, count: int, *, turned: bool
) -> Array:
    sizes = values.shape[1:][:: -1 if turned else 1]
    sides = _side(x.shape[1] // sizes[0], sizes[0]), _side(count, sizes[1])
    tile = _tile(x.shape[0], sizes)
    y = rows_by_blocks(
        _laid_out(x, sides[0], tile),
        values,
        other,
        Lists.of(own, count),
        sides=sides,
        tile=tile,
        turned=turned,
    )
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)[: x.shape[0]]


def _rows_by_rows(
    x: Array, dy: Array, rows: Array, columns: Array, grid: tuple[int, int]
) -> Array:
    inner, outer = (
        _side(count, a.shape[1] // count)
        for a, count in zip((x, dy), grid, strict=True)
    )
    tile = _tile(x.shape[0], (inner.size, outer.size))
    x, dy = _laid_out(x, inner, tile), _laid_out(dy, outer, tile)
    sides = inner, outer
    return rows_by_rows(x, dy, (rows, columns), sides=sides, tile=tile)


_product = differentiable(_rows_by_weights, _rows_by_rows)
