"""Products with live blocks on Hopper GPUs, by ``pallas_kernels.gpu.block_sparse``."""

import jax.numpy as jnp

from pallas_kernels import KernelError
from pallas_kernels.gpu import device
from pallas_kernels.gpu.block_sparse import fitting, rows_by_blocks, rows_by_rows
from pallas_kernels.gpu.grouped_frame import STEP
from sparsejax.compat import HAS_MOSAIC_GPU
from sparsejax.masked.block_sparse_gradient import Lists, differentiable, filled
from sparsejax.typing import Array

__all__ = ["mosaic_gpu", "obstacle"]

TALL = 128  # rows of a tile; few ones make do with 64


def mosaic_gpu(
    x: Array, values: Array, rows: Array, columns: Array, grid: tuple[int, int]
) -> Array:
    """Tiles of the tensor cores, accumulated in float32.

    Raises:
        KernelError: if device, dtype or blocks are not for these kernels.
    """
    if reason := obstacle(x, values):
        raise KernelError(f"implementation='mosaic_gpu' {reason}")
    return _product(x, values, rows, columns, grid)


def obstacle(x: Array, values: Array) -> str | None:
    """Say why the kernels cannot take these operands here; None if they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"with {x.dtype}: the tensor cores take bfloat16 and float16; cast x and"
            " the weight, or use 'xla'"
        )
    if any(side % STEP for side in values.shape[1:]):
        return (
            f"with blocks of {values.shape[1:]}: both sides must be multiples of"
            f" {STEP}; cut the weight into larger blocks, or use 'xla'"
        )
    return device.obstacle(supported=HAS_MOSAIC_GPU)


def _rows_by_weights(
    x: Array, values: Array, own: Array, other: Array, count: int, *, turned: bool
) -> Array:
    tall = TALL if x.shape[0] > STEP else STEP
    width = values.shape[1 if turned else 2]
    tiling = fitting(tall, width, programs=device.programs())
    lists = Lists.of(own, count)
    padded = filled(x, tall)
    y = rows_by_blocks(padded, values, other, lists, tiling=tiling, turned=turned)
    return y[: x.shape[0]]


def _rows_by_rows(
    x: Array, dy: Array, rows: Array, columns: Array, grid: tuple[int, int]
) -> Array:
    tall, wide = (a.shape[1] // n for a, n in zip((x, dy), grid, strict=True))
    tiling = fitting(tall, wide, programs=device.programs())
    x, dy = filled(x, STEP), filled(dy, STEP)
    return rows_by_rows(x, dy, (rows, columns), sides=(tall, wide), tiling=tiling)


_product = differentiable(_rows_by_weights, _rows_by_rows)
