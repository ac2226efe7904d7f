"""Grouped products on Hopper GPUs, by the kernels of ``pallas_kernels.gpu.grouped``."""

import jax.numpy as jnp

from pallas_kernels import KernelError
from pallas_kernels.gpu import device
from pallas_kernels.gpu.grouped import rows_by_rows, rows_by_weights
from pallas_kernels.gpu.grouped_frame import STEP, Tiling
from pallas_kernels.gpu.grouped_tiles import ALIGNED
from sparsejax.compat import HAS_MOSAIC_GPU
from sparsejax.moe.grouped_gradient import differentiable
from sparsejax.typing import Array

__all__ = ["mosaic_gpu", "obstacle"]

LEAST = 128  # rows: those of the largest tile


def mosaic_gpu(x: Array, w: Array, group_sizes: Array) -> Array:
    """Tiles of the tensor cores, accumulated in float32.

    Raises:
        KernelError: if device, dtype or widths are not for these kernels.
    """
    if reason := obstacle(x, w):
        raise KernelError(f"implementation='mosaic_gpu' {reason}")
    return _product(x, w, group_sizes)


def obstacle(x: Array, w: Array) -> str | None:
    """Say why the kernels cannot take these operands here; None if they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"with {x.dtype}: the tensor cores take bfloat16 and float16; cast x and w,"
            " or use 'xla'"
        )
    if w.shape[1] % STEP or w.shape[2] % STEP:
        return (
            f"with weights of {w.shape[1]} x {w.shape[2]}: both must be multiples of"
            f" {STEP}; pad them with zeros, or use 'xla'"
        )
    return device.obstacle(supported=HAS_MOSAIC_GPU)


def _tiling(rows: int, columns: int, *, slots: int = 4) -> Tiling:
    """The largest tiles that divide a result of so many rows and columns."""
    height = next(n for n in (128, 64) if rows % n == 0)
    width = next(n for n in (256, 128, 64) if columns % n == 0)
    return Tiling(rows=height, columns=width, slots=slots, programs=device.programs())


def _padded(rows: Array) -> Array:
    """Add rows up to a multiple of 8, and at least one tile."""
    count = max(LEAST, -(-rows.shape[0] // ALIGNED) * ALIGNED)
    missing = count - rows.shape[0]
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _by_weights(rows: Array, w: Array, group_sizes: Array, *, contract: int) -> Array:
    tiling = _tiling(LEAST, w.shape[2 - contract])
    turned = contract == 1
    y = rows_by_weights(_padded(rows), w, group_sizes, tiling=tiling, turned=turned)
    return y[: rows.shape[0]]


def _by_rows(x: Array, dy: Array, group_sizes: Array) -> Array:
    tiling = _tiling(x.shape[1], dy.shape[1])
    return rows_by_rows(_padded(x), _padded(dy), group_sizes, tiling=tiling)


_product = differentiable(_by_weights, _by_rows)
