"""Grouped products on TPUs, by the kernels of ``pallas_kernels.tpu.grouped``."""

import jax.numpy as jnp

from pallas_kernels import KernelError
from pallas_kernels.tpu.grouped import Tiling, rows_by_rows, rows_by_weights
from pallas_kernels.tpu.interpreter import needs_tpu
from sparsejax.moe.grouped_gradient import differentiable
from sparsejax.partition import platform
from sparsejax.typing import Array

__all__ = ["mosaic_tpu"]

LANES = 128
TALL, WIDE = 512, 1024  # the largest tile of rows, and block of a weight's axis
SUBLANES = 16  # of 16-bit numbers; a multiple of those of 32-bit ones
WHOLE = 2048  # an axis that no lanes divide is one block, up to here


def mosaic_tpu(x: Array, w: Array, group_sizes: Array) -> Array:
    """Tiles of the matrix unit, accumulated in float32.

    Raises:
        KernelError: where there is no TPU, and for dtypes or widths that are not for
            these kernels.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise KernelError(
            f"implementation='mosaic_tpu' with {x.dtype}: TPU kernels compute in"
            " bfloat16 and float32; cast x and w to one"
        )
    for size in w.shape[1:]:
        if size % LANES and size > WHOLE:
            raise KernelError(
                f"implementation='mosaic_tpu' with weights of {w.shape[1]} x"
                f" {w.shape[2]}: above {WHOLE}, {size} must be a multiple of {LANES};"
                " pad it with zeros, or use 'xla'"
            )
    needs_tpu(platform())
    return _product(x, w, group_sizes)


def _block(size: int) -> int:
    """Cut an axis of the weights: by the largest block that divides it."""
    blocks = (WIDE, WIDE // 2, WIDE // 4, LANES)
    return next((n for n in blocks if size % n == 0), size)


def _tiling(rows: int, w: tuple[int, ...]) -> Tiling:
    """Tiles about as tall as a group, which are visited once for each group in them."""
    groups, width, hidden = w
    tall = LANES
    while tall < min(TALL, rows // groups):
        tall *= 2
    tall = min(tall, -(-rows // SUBLANES) * SUBLANES)
    return Tiling(rows=tall, width=_block(width), hidden=_block(hidden))


def _padded(rows: Array, tile: int) -> Array:
    missing = -rows.shape[0] % tile
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _by_weights(rows: Array, w: Array, group_sizes: Array, *, contract: int) -> Array:
    tiling = _tiling(rows.shape[0], w.shape)
    y = rows_by_weights(
        _padded(rows, tiling.rows), w, group_sizes, tiling=tiling, turned=contract == 1
    )
    return y[: rows.shape[0]]


def _by_rows(x: Array, dy: Array, group_sizes: Array) -> Array:
    shape = group_sizes.shape[0], x.shape[1], dy.shape[1]
    tiling = _tiling(x.shape[0], shape)
    x, dy = (_padded(a, tiling.rows) for a in (x, dy))
    return rows_by_rows(x, dy, group_sizes, tiling=tiling)


_product = differentiable(_by_weights, _by_rows)
