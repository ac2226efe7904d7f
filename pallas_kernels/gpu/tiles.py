"""Tiles: what a warpgroup does with matrices in shared memory and registers.

Only what JAX's interpreter of Mosaic GPU runs as well: both operands of a product lie
in shared memory, and a sum that must be rescaled is a value, not an accumulator.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.interpreter import is_interpreted

__all__ = [
    "MATRIX",
    "PER_ROW",
    "ROWS",
    "accumulate",
    "accumulator",
    "constant",
    "fence",
    "finish",
    "laid",
    "load",
    "product",
    "put",
    "spread",
    "swizzle",
    "tile",
    "transposed",
    "value",
]

ROWS = 64  # of one warpgroup in a wgmma
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)
# Before JAX 0.11 a load must have an index too, after it none.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_WHOLE = ((),) if _INDEX and _INDEX.default is _INDEX.empty else ()


def _audit(*operands: Any) -> None:
    """Let the race detector see what a wgmma reads: without this, it sees nothing."""
    if is_interpreted():
        for ref in operands:
            ref[...]
        fence()  # a plain read counts as finished only behind one


def product(a: Any, b: Any, *, meanwhile: Callable[[], Any] = tuple) -> jax.Array:
    """``a @ b`` of two tiles, in registers.

    Args:
        a: the left tile.
        b: the right tile.
        meanwhile: what to do before waiting for the result.
    """

    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        _audit(a, b)
        meanwhile()
        return acc[...]  # waits

    return pl.run_scoped(run, accumulator(a.shape[0], b.shape[1]))


def accumulator(rows: int, columns: int) -> Any:
    """A sum of products in registers, 0 at first; for ``pl.run_scoped``."""
    return plgpu.ACC((rows, columns), jnp.float32)


def value(acc: Any, *, behind: int = 0) -> jax.Array:
    """Read a sum once all products are finished but the ``behind`` latest."""
    return plgpu.wgmma_accumulator_load(acc, wait_n=behind)


def accumulate(acc: Any, a: Any, b: Any) -> None:
    """``acc += a @ b``; finished after ``finish``, ``value`` or ``product``."""
    plgpu.wgmma(acc, a, b)
    _audit(a, b)


def finish() -> None:
    """Wait for all products: only then may their operands be overwritten."""
    plgpu.wgmma_wait(0)


def fence() -> None:
    """Order plain accesses to shared memory before those of wgmma and of copies."""
    plgpu.commit_smem()


def put(tile: Any, value: jax.Array) -> None:
    """Write a tile that a wgmma or a copy reads next: they see it after the fence."""
    tile[...] = value.astype(tile.dtype)
    fence()


def transposed(tile: Any) -> Any:
    """View a tile with its axes exchanged."""
    return tile.transpose((1, 0))


def constant(value: float, shape: tuple[int, ...], layout: Any = MATRIX) -> jax.Array:
    """Start a loop's carry: its layout must be given."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Repeat a vector that lies along ``axis``."""
    return lax.broadcast_in_dim(x, shape, [axis])


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """Load a tile into registers, laid out so."""
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=optimized)


def laid(ref: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Load a vector that lies along ``axis`` of a tile, and repeat it."""
    return spread(load(ref, MATRIX.reduce(1 - axis)), shape, axis)


def swizzle(columns: int, dtype: Any) -> int:
    """Bytes of the widest swizzle whose tiles cut rows of ``columns`` evenly.

    Raises:
        ValueError: if there is none.
    """
    size = columns * jnp.dtype(dtype).itemsize
    width = next((b for b in (128, 64, 32) if size % b == 0), None)
    if width is None:
        raise ValueError(f"rows of {columns}: pad them to a multiple of 16")
    return width


def tile(shape: tuple[int, ...], dtype: Any, width: int) -> Any:
    """Shared memory: matrices swizzled by ``width`` bytes for wgmma, vectors plain."""
    if len(shape) == 2:
        return plgpu.SMEM(shape, dtype)
    shapes: Any = plgpu  # whose types are abstract, says pyright
    tiling = shapes.TilingTransform((8, width // jnp.dtype(dtype).itemsize))
    transforms = tiling, shapes.SwizzleTransform(width)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
