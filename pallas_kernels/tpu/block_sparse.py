"""Products with live blocks of a weight on TPUs: a grid that walks tiles and entries.

Arrays of rows are "a n c": all columns at once, ``a`` = 1, where blocks of ``c`` lanes
can be cut out of them, or else one slice for each block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.blocks import NN, NT, TN, product
from pallas_kernels.tpu.pairs import (
    BITS,
    EMPTY,
    FIRST,
    FULL,
    KIND,
    LAST,
    Rows,
    pair_list,
)

__all__ = ["Side", "rows_by_blocks", "rows_by_rows"]

VMEM = 64 * 2**20
KINDS = (1 << (BITS - KIND)) - 1


class Side(NamedTuple):
    """Static: how one side of the weight is cut, and how rows of that width lie."""

    blocks: int
    size: int
    split: bool  # one slice for each block, else all columns at once

    def shape(self, rows: int) -> tuple[int, int, int]:
        """Shape of an array of rows."""
        if self.split:
            return self.blocks, rows, self.size
        return 1, rows, self.blocks * self.size

    def at(self, tile: Any, block: Any) -> tuple[Any, Any, Any]:
        """Index of a block of a tile of rows."""
        return (block, tile, 0) if self.split else (0, tile, block)


def rows_by_blocks(
    x: jax.Array,
    values: jax.Array,
    other: jax.Array,
    lists: tuple[jax.Array, jax.Array],
    *,
    sides: tuple[Side, Side],
    tile: int,
    turned: bool = False,
) -> jax.Array:
    """Multiply rows by the blocks, added up by block of the output.

    Args:
        x: rows, as the first side says; their number is a multiple of ``tile``.
        values: blocks, "k d f".
        other: int32 block of ``x`` that each entry reads; anything if never listed.
        lists: entries in order of the output, and where each of its blocks begins.
        sides: of ``x`` and of the output.
        tile: rows of a grid step.
        turned: whether blocks are contracted over their last axis.
    """
    order, start = lists
    inner, outer = sides
    live = jnp.full(order.shape, FULL, jnp.int32)
    listed = Rows(start[:-1], jnp.diff(start), order, live)
    pairs = pair_list(listed, len(order) + outer.blocks)
    # Even an empty column fetches some block, so all of them exist.
    other = jnp.clip(other, 0, inner.blocks - 1)

    def x_at(i: Any, n: Any, _: Any, entries: Any, other: Any) -> Any:
        return inner.at(i, other[entries[n]])

    def w_at(_: Any, n: Any, __: Any, entries: Any, ___: Any) -> Any:
        return entries[n], 0, 0

    def y_at(i: Any, n: Any, words: Any, *_: Any) -> Any:
        return outer.at(i, words[n] >> BITS)

    def kernel(
        words: Any,
        entries: Any,
        other: Any,
        x_ref: Any,  # [tile, inner]
        w_ref: Any,  # a block
        y_ref: Any,  # [tile, outer]  out
        total: Any,  # [tile, outer]
    ) -> None:
        del entries, other
        word = words[pl.program_id(1)]

        def add() -> None:
            total[...] += product(x_ref[...], w_ref[...], NT if turned else NN)

        kind = (word >> KIND) & np.int32(KINDS)
        _summed(total, y_ref, word & FIRST != 0, word & LAST != 0, kind != EMPTY, add)

    return _launch(
        kernel,
        (pairs.words, pairs.others, other),
        (x, values),
        grid=(x.shape[1] // tile, pairs.total),
        specs=[
            pl.BlockSpec((None, tile, inner.size), x_at),
            pl.BlockSpec((None, *values.shape[1:]), w_at),
        ],
        shape=outer.shape(x.shape[1]),
        block=(tile, outer.size),
        at=y_at,
    )


def rows_by_rows(
    x: jax.Array,
    dy: jax.Array,
    ids: tuple[jax.Array, jax.Array],
    *,
    sides: tuple[Side, Side],
    tile: int,
) -> jax.Array:
    """Give ``x.T @ dy`` of the columns of each entry, "k d f"; 0 if not live.

    Args:
        x: rows, as the first side says; their number is a multiple of ``tile``.
        dy: rows, as the second side says.
        ids: int32 block of either that an entry reads; negative if it is not live.
        sides: of ``x`` and of ``dy``.
        tile: rows of a grid step.
    """

    def spec(which: int) -> pl.BlockSpec:
        def at(entry: Any, i: Any, *ids: Any) -> Any:
            return sides[which].at(i, jnp.maximum(ids[which][entry], 0))

        return pl.BlockSpec((None, tile, sides[which].size), at)

    def kernel(
        rows: Any,
        columns: Any,
        x_ref: Any,  # [tile, size]
        dy_ref: Any,  # [tile, size]
        dw_ref: Any,  # [size, size]  out
        total: Any,  # [size, size]
    ) -> None:
        del columns
        entry, i = pl.program_id(0), pl.program_id(1)

        def add() -> None:
            total[...] += product(x_ref[...], dy_ref[...], TN)

        last = i == pl.num_programs(1) - 1
        _summed(total, dw_ref, i == 0, last, rows[entry] >= 0, add)

    return _launch(
        kernel,
        ids,
        (x, dy),
        grid=(len(ids[0]), x.shape[1] // tile),
        specs=[spec(0), spec(1)],
        shape=(len(ids[0]), sides[0].size, sides[1].size),
        block=(sides[0].size, sides[1].size),
        at=lambda entry, *_: (entry, 0, 0),
    )


def _summed(
    total: Any,
    result: Any,
    first: Any,
    last: Any,
    live: Any,
    add: Callable[[], None],
) -> None:
    """Begin a sum, add to it where the step is live, and store it."""

    @pl.when(first)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    pl.when(live)(add)

    @pl.when(last)
    def _() -> None:
        result[...] = total[...].astype(result.dtype)


def _launch(
    kernel: Callable[..., None],
    scalars: tuple[jax.Array, ...],
    operands: tuple[jax.Array, jax.Array],
    *,
    grid: tuple[Any, Any],
    specs: list[pl.BlockSpec],
    shape: tuple[int, ...],
    block: tuple[int, int],
    at: Callable[..., Any],
) -> jax.Array:
    """Run a kernel over a grid whose last axis adds up, in a float32 block."""
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=specs,
            out_specs=pl.BlockSpec((None, *block), at),
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
        ),
        # Under a mesh all operands vary alike, and so does the result.
        out_shape=jax.ShapeDtypeStruct(
            shape,
            operands[0].dtype,
            manual_axis_type=jax.typeof(operands[0]).manual_axis_type,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
    )
    return call(*scalars, *operands)
