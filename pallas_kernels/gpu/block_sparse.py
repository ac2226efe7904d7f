"""Products with live blocks of a weight: rows by the blocks, and rows by rows.

The frame is that of grouped products. A tile of the result belongs to one block of its
columns, and adds up that block's live entries in the order of a traced list; a block
that has none is written as 0. Nothing that is not listed is copied.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu.grouped_frame import (
    STEP,
    Tiling,
    Work,
    check,
    in_panels,
    launch,
    send,
)
from pallas_kernels.gpu.tiles import ROWS, transposed

__all__ = ["fitting", "rows_by_blocks", "rows_by_rows"]

SLOTS = {256: 4, 128: 6, 64: 6}  # by columns of a tile: what shared memory holds


def fitting(rows: int, columns: int, *, programs: int = 132) -> Tiling:
    """The largest tiles that divide parts of so many rows and columns."""
    height = next(n for n in (2 * ROWS, ROWS) if rows % n == 0)
    width = next(n for n in SLOTS if columns % n == 0)
    return Tiling(rows=height, columns=width, slots=SLOTS[width], programs=programs)


class _Sum(NamedTuple):
    """A tile of rows by the entries of one block of columns."""

    row: Any  # first row of the result
    column: Any
    inside: Any  # first column, counted in its block
    first: Any  # place of its first entry in the list
    steps: Any


class _Entry(NamedTuple):
    """A tile of an entry's own product."""

    entry: Any
    row: Any  # first row of the result, counted in the entry
    column: Any
    left: Any  # first columns of either operand
    right: Any
    steps: Any


def rows_by_blocks(
    x: jax.Array,
    values: jax.Array,
    other: jax.Array,
    lists: tuple[jax.Array, jax.Array],
    *,
    tiling: Tiling,
    turned: bool = False,
) -> jax.Array:
    """Multiply rows "n d" by the blocks, added up by block of the result.

    Args:
        x: rows, a multiple of a tile's.
        values: blocks, "k d f", whose sides are multiples of 64.
        other: int32 block of ``x`` that each entry reads; anything if never listed.
        lists: entries in order of the result, and where each of its blocks begins.
        tiling: whose columns divide a block of the result.
        turned: whether blocks are contracted over their last axis.
    """
    order, start = lists
    inner, outer = values.shape[1:][:: -1 if turned else 1]
    check(tiling, rows=x.shape[0], contracted=inner, columns=outer)
    table = {"entry": order, "other": other[order], "start": start}
    width, each = (len(start) - 1) * outer, inner // STEP
    down, across = x.shape[0] // tiling.rows, width // tiling.columns

    def item(refs: Any, number: Any) -> Any:
        i, j = in_panels(number, jnp.int32(down), across, tiling.panel)
        column = j * tiling.columns
        block = lax.div(column, jnp.int32(outer))
        first, end = refs["start"][block], refs["start"][block + 1]
        inside = column - block * outer
        return _Sum(i * tiling.rows, column, inside, first, (end - first) * each)

    def listed(refs: Any, name: str, item: _Sum, step: Any) -> tuple[Any, Any]:
        at = lax.div(step, jnp.int32(each))
        return refs[name][item.first + at], (step - at * each) * STEP

    def left(refs: Any, item: _Sum, step: Any, warpgroup: int) -> Any:
        block, depth = listed(refs, "other", item, step)
        column = pl.multiple_of(block * inner + depth, STEP)
        return refs["left"].at[_rows(item, warpgroup), pl.ds(column, STEP)]

    def right(refs: Any, item: _Sum, step: Any) -> Any:
        entry, depth = listed(refs, "entry", item, step)
        inside = pl.multiple_of(item.inside, STEP)
        span = pl.ds(pl.multiple_of(depth, STEP), STEP), pl.ds(inside, tiling.columns)
        return refs["right"].at[(entry, *(span[::-1] if turned else span))]

    def store(refs: Any, tiles: Any, item: _Sum, group: Any, y: Any) -> None:
        _store(refs["out"].at[_rows(item, group)], tiles, item, group, y)

    work = Work(
        items=lambda _: jnp.int32(down * across),
        item=item,
        left=left,
        right=right,
        views=(_same, transposed if turned else _same),
        prepare=None,
        store=store,
    )
    right_tile = (tiling.columns, STEP) if turned else (STEP, tiling.columns)
    shape = jax.ShapeDtypeStruct((x.shape[0], width), x.dtype)
    return launch(work, tiling, table, {"left": x, "right": values}, shape, right_tile)


def rows_by_rows(
    x: jax.Array,
    dy: jax.Array,
    ids: tuple[jax.Array, jax.Array],
    *,
    sides: tuple[int, int],
    tiling: Tiling,
) -> jax.Array:
    """Give ``x.T @ dy`` of the columns of each entry, "k d f"; 0 if not live.

    Args:
        x: rows "n d", a multiple of 64.
        dy: rows "n f".
        ids: int32 block of either that an entry reads; negative if it is not live.
        sides: of a block.
        tiling: whose rows and columns divide them.
    """
    check(tiling, rows=sides[0], contracted=x.shape[0], columns=sides[1])
    down, across = sides[0] // tiling.rows, sides[1] // tiling.columns
    table = {"rows": ids[0], "columns": ids[1]}

    def item(refs: Any, number: Any) -> Any:
        entry = lax.div(number, jnp.int32(down * across))
        part = number - entry * (down * across)
        i = lax.div(part, jnp.int32(across))
        row, column = i * tiling.rows, (part - i * across) * tiling.columns
        own, other = refs["rows"][entry], refs["columns"][entry]
        left, right = own * sides[0] + row, other * sides[1] + column
        steps = jnp.where(own >= 0, x.shape[0] // STEP, 0)
        return _Entry(entry, row, column, left, right, steps)

    def left(refs: Any, item: _Entry, step: Any, warpgroup: int) -> Any:
        first = pl.multiple_of(item.left + warpgroup * ROWS, ROWS)
        return refs["left"].at[pl.ds(step * STEP, STEP), pl.ds(first, ROWS)]

    def right(refs: Any, item: _Entry, step: Any) -> Any:
        columns = pl.ds(pl.multiple_of(item.right, STEP), tiling.columns)
        return refs["right"].at[pl.ds(step * STEP, STEP), columns]

    def store(refs: Any, tiles: Any, item: _Entry, group: Any, y: Any) -> None:
        target = refs["out"].at[item.entry, _rows(item, group)]
        _store(target, tiles, item, group, y)

    work = Work(
        items=lambda _: jnp.int32(len(ids[0]) * down * across),
        item=item,
        left=left,
        right=right,
        views=(transposed, _same),
        prepare=None,
        store=store,
    )
    shape = jax.ShapeDtypeStruct((len(ids[0]), *sides), x.dtype)
    operands = {"left": x, "right": dy}
    return launch(work, tiling, table, operands, shape, (STEP, tiling.columns))


def _rows(item: Any, group: Any) -> Any:
    """Rows of the result that a warpgroup computes."""
    return pl.ds(pl.multiple_of(item.row + group * ROWS, ROWS), ROWS)


def _same(ref: Any) -> Any:
    return ref


def _store(rows: Any, tiles: Any, item: Any, group: Any, y: jax.Array) -> None:
    for n in range(y.shape[1] // STEP):
        columns = pl.ds(item.column + n * STEP, STEP)
        send(tiles, group, n, y, rows.at[:, columns])
