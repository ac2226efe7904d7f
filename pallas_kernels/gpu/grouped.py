"""Grouped matrix products: rows by their group's weight, and rows by rows.

Persistent programs walk one list of output tiles. A memory warpgroup copies operands
into a ring of slots, some tiles ahead; each compute warpgroup of 64 rows adds products
in registers. The list is traced: ``grouped_tiles`` says which rows are in a tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.grouped_frame import (
    STEP,
    Tiling,
    Work,
    check,
    in_panels,
    launch,
    piece,
    send,
)
from pallas_kernels.gpu.grouped_tiles import ALIGNED, row_spans, row_tiles
from pallas_kernels.gpu.tiles import MATRIX, ROWS, put, transposed

__all__ = ["rows_by_rows", "rows_by_weights"]

# Rows of a copy are static: one size for each bit of a count.
_SIZES = (32, 16, 8, 4, 2, 1)


class Item(NamedTuple):
    """One output tile: where it lies and what is added up in it."""

    group: Any
    row: Any  # first row of the output
    column: Any
    first: Any  # where contraction starts
    low: Any  # live rows: [low, high)
    high: Any
    steps: Any


def rows_by_weights(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    tiling: Tiling,
    turned: bool = False,
) -> jax.Array:
    """Multiply rows "m d" by the weight "d f" of their group; 0 past the groups.

    Args:
        x: rows, a multiple of 8 and not fewer than a tile has.
        w: "e d f", or "e f d" if turned.
        group_sizes: rows of each group, int32, at most ``m`` together.
        tiling: whose columns divide ``f``.
        turned: whether weights are contracted over their last axis.
    """
    (rows, depth), experts = x.shape, w.shape[0]
    width = w.shape[1 if turned else 2]
    check(tiling, rows=rows, contracted=depth, columns=width)
    table = row_tiles(group_sizes, rows, tiling.rows)
    across = width // tiling.columns

    def items(refs: Any) -> Any:
        return refs["count"][0] * across

    def item(refs: Any, number: Any) -> Item:
        at, column = in_panels(number, refs["count"][0], across, tiling.panel)
        group = refs["group"][at]
        steps = jnp.where(group < experts, depth // STEP, 0)  # none past the groups
        row, low, high = (refs[name][at] for name in ("row", "low", "high"))
        column = column * tiling.columns
        return Item(group, row, column, jnp.int32(0), low, high, steps)

    def left(refs: Any, item: Item, step: Any, warpgroup: int) -> Any:
        row = pl.multiple_of(item.row + warpgroup * ROWS, ALIGNED)
        return refs["left"].at[pl.ds(row, ROWS), pl.ds(step * STEP, STEP)]

    def right(refs: Any, item: Item, step: Any) -> Any:
        span = pl.ds(step * STEP, STEP), pl.ds(item.column, tiling.columns)
        return refs["right"].at[(item.group, *(span[::-1] if turned else span))]

    work = Work(
        items=items,
        item=item,
        left=left,
        right=right,
        views=(_same, transposed if turned else _same),
        prepare=None,
        store=_store_rows,
    )
    right_tile = (tiling.columns, STEP) if turned else (STEP, tiling.columns)
    shape = jax.ShapeDtypeStruct((rows, width), x.dtype)
    operands = {"left": x, "right": w}
    return launch(work, tiling, table._asdict(), operands, shape, right_tile)


def rows_by_rows(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, tiling: Tiling
) -> jax.Array:
    """Give ``x.T @ dy`` of each group, "e d f"; 0 for an empty one.

    Args:
        x: rows "m d", a multiple of 8 and not fewer than a step has.
        dy: rows "m f".
        group_sizes: rows of each group, int32, at most ``m`` together.
        tiling: whose rows divide ``d`` and whose columns divide ``f``.
    """
    (rows, depth), width, experts = x.shape, dy.shape[1], group_sizes.shape[0]
    check(tiling, rows=depth, contracted=STEP, columns=width)
    down, across = depth // tiling.rows, width // tiling.columns
    table = row_spans(group_sizes, STEP)

    def items(_: Any) -> Any:
        return jnp.int32(experts * down * across)

    def item(refs: Any, number: Any) -> Item:
        group = lax.div(number, jnp.int32(down * across))
        inside = lax.rem(number, jnp.int32(down * across))
        i, j = in_panels(inside, jnp.int32(down), across, tiling.panel)
        first, low, high, steps = (
            refs[name][group] for name in ("first", "low", "high", "steps")
        )
        return Item(group, i * tiling.rows, j * tiling.columns, first, low, high, steps)

    def span(item: Item, step: Any) -> Any:
        return pl.ds(pl.multiple_of(_first(item, step, rows), ALIGNED), STEP)

    def left(refs: Any, item: Item, step: Any, warpgroup: int) -> Any:
        first = pl.multiple_of(item.row + warpgroup * ROWS, ROWS)
        columns = pl.ds(first, ROWS)
        return refs["left"].at[span(item, step), columns]

    def right(refs: Any, item: Item, step: Any) -> Any:
        columns = pl.ds(item.column, tiling.columns)
        return refs["right"].at[span(item, step), columns]

    def prepare(tiles: Any, item: Item, step: Any, group: Any, a: Any, b: Any) -> None:
        at, wanted = _first(item, step, rows), item.first + step * STEP
        low, high = jnp.maximum(item.low, wanted) - at, item.high - at

        @pl.when((low > 0) | (high < STEP))
        def _() -> None:
            _clear(tiles, tiling.groups, group, a, b, low, high)

    work = Work(
        items=items,
        item=item,
        left=left,
        right=right,
        views=(transposed, _same),
        prepare=prepare,
        store=_store_whole,
    )
    shape = jax.ShapeDtypeStruct((experts, depth, width), x.dtype)
    operands = {"left": x, "right": dy}
    return launch(
        work, tiling, table._asdict(), operands, shape, (STEP, tiling.columns)
    )


def _first(item: Item, step: Any, rows: int) -> Any:
    """First row of a step; the last one may start early, as all reads stay inside."""
    return jnp.minimum(item.first + step * STEP, rows - STEP)


def _clear(
    tiles: Any, groups: int, group: Any, a: Any, b: Any, low: Any, high: Any
) -> None:
    """Set rows of other groups to 0: they may hold what a factor of 0 keeps alive.

    Every warpgroup clears its own left tile and its share of the common right tile.
    """
    row = plgpu.broadcasted_iota(jnp.int32, (STEP, STEP), 0, layout=MATRIX)
    live = (row >= low) & (row < high)

    def clear(part: Any) -> None:
        put(part, jnp.where(live, part[...].astype("float32"), 0.0))

    clear(a)
    for n in range(b.shape[1] // STEP):
        share = b.at[:, pl.ds(n * STEP, STEP)]
        pl.when(group == n % groups)(lambda share=share: clear(share))
    if groups > 1:
        plgpu.barrier_arrive(tiles["cleared"])
        plgpu.barrier_wait(tiles["cleared"])


def _same(ref: Any) -> Any:
    return ref


def _store_rows(refs: Any, tiles: Any, item: Item, group: Any, y: Any) -> None:
    """Write the live rows of a tile; the others belong to another tile."""
    start = item.row + group * ROWS
    low = jnp.maximum(item.low - start, 0)
    count = jnp.minimum(item.high - start, ROWS) - low
    pieces = y.shape[1] // STEP

    @pl.when(count == ROWS)
    def _() -> None:
        for n in range(pieces):
            span = pl.ds(pl.multiple_of(start, ALIGNED), ROWS)
            columns = pl.ds(item.column + n * STEP, STEP)
            send(tiles, group, n, y, refs["out"].at[span, columns])

    @pl.when((count > 0) & (count < ROWS))
    def _() -> None:
        plain = tiles["plain"].at[group]
        for n in range(pieces):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put(plain, piece(y, n))
            columns = pl.ds(item.column + n * STEP, STEP)
            at = low
            for size in _SIZES:

                @pl.when((count & size) != 0)
                def _(at: Any = at, size: int = size, columns: Any = columns) -> None:
                    target = refs["out"].at[pl.ds(start + at, size), columns]
                    plgpu.copy_smem_to_gmem(plain.at[pl.ds(at, size)], target)

                at = at + (count & size)


def _store_whole(refs: Any, tiles: Any, item: Item, group: Any, y: Any) -> None:
    rows = pl.ds(pl.multiple_of(item.row + group * ROWS, ROWS), ROWS)
    for n in range(y.shape[1] // STEP):
        columns = pl.ds(item.column + n * STEP, STEP)
        target = refs["out"].at[item.group, rows, columns]
        send(tiles, group, n, y, target)
