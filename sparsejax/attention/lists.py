"""Ordered lists of live blocks: the form in which a block mask is kept and walked.

A kind per block (``EMPTY``, ``PARTIAL``, ``FULL``) becomes, per row, the ids of the
live blocks with the full ones first; entries past ``count`` are padding and never read.
The functions here run on numpy (concrete, narrow tables) or on JAX arrays (traced).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparsejax.attention.patterns import Cover, Pattern, Span

EMPTY, PARTIAL, FULL = 0, 1, 2

SHORT = 16  # up to so many places counting is several times as fast as sorting
_CHUNK = 2**22  # candidate blocks judged at once: some tens of megabytes


class Lists(NamedTuple):
    """Live blocks per row: ``full <= count <= ids.shape[-1]``."""

    ids: Any  # int32 "... i j", the full blocks first
    count: Any  # int32 "... i"
    full: Any  # int32 "... i"


class Grid(NamedTuple):
    """How positions are cut into blocks."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.kv_len // self.block_kv)

    def kinds(self, pattern: Pattern, row: Any, column: Any, q_offset: Any) -> Any:
        """Judge blocks; a block that crosses ``kv_len`` is at most partial."""
        xp = np if isinstance(column, np.ndarray) else jnp
        top = q_offset + row * self.block_q
        last = xp.minimum(row * self.block_q + self.block_q, self.q_len) - 1
        left, end = column * self.block_kv, (column + 1) * self.block_kv
        right = xp.minimum(end, self.kv_len) - 1
        cover = pattern.cover(Span(top, q_offset + last), Span(left, right))
        return as_kinds(Cover(cover.some, cover.every & (end <= self.kv_len)))


def as_kinds(cover: Cover) -> Any:
    """Turn two booleans per block into its kind."""
    return cover.some.astype("int8") + (cover.some & cover.every).astype("int8")


def ordered(kinds: Any, ids: Any = None) -> Lists:
    """Lists of the live blocks of ``kinds`` "... i j", full ones first, then by place.

    Args:
        kinds: kind of each place.
        ids: block id of each place; by default the place itself.
    """
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    if xp is jnp and kinds.shape[-1] <= SHORT:
        order = _ranked(kinds)
    else:
        order = xp.argsort(-kinds, axis=-1, stable=True).astype("int32")
    if ids is not None:
        order = xp.take_along_axis(ids, order, axis=-1)
    count = (kinds > EMPTY).sum(axis=-1).astype("int32")
    lists = Lists(order, count, (kinds == FULL).sum(axis=-1).astype("int32"))
    return lists if xp is jnp else lists._replace(ids=_narrow(order, count))


def _ranked(kinds: Any) -> Any:
    """Sort as ``argsort(-kinds)`` does, by counting what goes before each place."""
    place = jnp.arange(kinds.shape[-1], dtype="int32")
    place = place.reshape((1,) * (kinds.ndim - 1) + place.shape)
    here, there = place[..., :, None], place[..., None, :]
    own, other = kinds[..., :, None], kinds[..., None, :]
    before = (other > own) | ((other == own) & (there < here))
    rank = before.sum(axis=-1, dtype="int32")
    return jnp.where(rank[..., None, :] == here, there, 0).sum(axis=-1)


def of_blocks(
    ids: Any, count: Any, grid: Grid, pattern: Pattern | None, q_offset: Any
) -> Lists:
    """Lists of chosen blocks, without those in which ``pattern`` allows nothing."""
    if pattern is None and grid.kv_len % grid.block_kv == 0:
        return Lists(jnp.asarray(ids, "int32"), *(jnp.asarray(count, "int32"),) * 2)
    live = entry_kinds(Lists(ids, count, np.zeros(count.shape, "int32"))) > EMPTY
    safe = jnp.where(live, jnp.asarray(ids, "int32"), 0)
    if pattern is None:
        whole = (safe + 1) * grid.block_kv <= grid.kv_len
        return ordered(as_kinds(Cover(live, whole)), safe)
    row = jnp.arange(grid.rows, dtype="int32")[None, None, :, None]
    kinds = grid.kinds(pattern, row, safe, q_offset)
    return ordered(jnp.where(live, kinds, jnp.int8(EMPTY)), safe)


def of_pattern(pattern: Pattern, grid: Grid, q_offset: int) -> Lists:
    """Lists of a static pattern, from column intervals and some rows at a time."""
    rows = np.arange(grid.rows)
    top = q_offset + rows * grid.block_q
    last = np.minimum(rows * grid.block_q + grid.block_q, grid.q_len) - 1 + q_offset
    lows, widths = [], []
    for span in pattern.reads(Span(top, last)):
        low = np.clip(span.first, 0, grid.kv_len) // grid.block_kv
        high = np.minimum(span.last, grid.kv_len - 1) // grid.block_kv
        lows.append(low)
        widths.append(np.maximum(high - low + 1, 0))
    step = max(1, _CHUNK // max(1, sum(int(w.max()) for w in widths)))
    chunks = [
        _chunk(pattern, grid, q_offset, rows[part], lows, widths)
        for part in (slice(s, s + step) for s in range(0, grid.rows, step))
    ]
    return stack_lists(chunks, np.concatenate)


def most(pattern: Pattern, grid: Grid) -> int:
    """Bound the live blocks of a row that begins before twice the keys' end.

    Where rules that exclude each other share a block it counts as live.
    """
    first, width = np.arange(2 * grid.kv_len), grid.block_kv
    blocks = np.zeros(first.shape, np.int64)
    for span in pattern.reads(Span(first, first + grid.block_q - 1)):
        low, high = np.maximum(span.first, 0), np.minimum(span.last, 2 * grid.kv_len)
        touched = (high - low) // width + 2  # wherever an interval begins
        blocks += np.where(high >= low, touched, low - high < width)
    return max(1, min(int(blocks.max()), grid.columns))


def _chunk(pattern, grid, q_offset, rows, lows, widths) -> Lists:
    """Judge the candidate blocks of some rows; a block found twice counts once."""
    found = [np.full((len(rows), 1), grid.columns)]
    for low, width in zip(lows, widths, strict=True):
        place = np.arange(int(width[rows].max()))[None]
        block = low[rows][:, None] + place
        found.append(np.where(place < width[rows][:, None], block, grid.columns))
    block = np.sort(np.concatenate(found, axis=1), axis=1)
    fresh = np.ones(block.shape, bool)
    fresh[:, 1:] = block[:, 1:] != block[:, :-1]
    kinds = grid.kinds(pattern, rows[:, None], block, q_offset)
    kinds = np.where(fresh & (block < grid.columns), kinds, EMPTY).astype("int8")
    return ordered(kinds, block.astype("int32"))


def stack_lists(lists: list[Lists], join: Any) -> Lists:
    """Join numpy lists of different widths with ``np.stack`` or ``np.concatenate``."""
    width = max(x.ids.shape[-1] for x in lists)
    ids = [
        np.pad(x.ids, [(0, 0)] * (x.ids.ndim - 1) + [(0, width - x.ids.shape[-1])])
        for x in lists
    ]
    return Lists(
        join(ids), join([x.count for x in lists]), join([x.full for x in lists])
    )


def _narrow(ids: np.ndarray, count: np.ndarray) -> np.ndarray:
    width = max(1, int(count.max(initial=0)))
    ids = ids[..., :width]
    return np.where(np.arange(width) < count[..., None], ids, 0).astype("int32")


def clipped(lists: Lists, capacity: int) -> Lists:
    """Lists of a fixed width.

    Raises:
        ValueError: if concrete lists do not fit.
    """
    if not is_traced(lists.count):
        longest = int(np.max(lists.count, initial=0))
        if longest > capacity:
            raise ValueError(f"capacity={capacity}: a row reads {longest} blocks")
    ids = lists.ids[..., :capacity]
    return Lists(
        ids, jnp.minimum(lists.count, capacity), jnp.minimum(lists.full, capacity)
    )


def entry_kinds(lists: Lists) -> jax.Array:
    """Kind of every entry of ``ids``; the padding is ``EMPTY``."""
    *lead, width = lists.ids.shape
    place = jnp.arange(width, dtype="int32").reshape(*[1] * len(lead), width)
    live = place < jnp.asarray(lists.count)[..., None]
    whole = place < jnp.asarray(lists.full)[..., None]
    return live.astype("int8") + whole.astype("int8")


def kind_map(lists: Lists, columns: int) -> jax.Array:
    """Kind of every block, "... i j": the inverse of ``ordered``."""
    kinds = entry_kinds(lists).reshape(-1, lists.ids.shape[-1])
    ids = jnp.where(kinds > EMPTY, jnp.asarray(lists.ids).reshape(kinds.shape), columns)
    row = jnp.arange(len(kinds), dtype="int32")[:, None]
    dense = jnp.zeros((len(kinds), columns), "int8")
    dense = dense.at[row, ids].set(kinds, mode="drop")
    return dense.reshape(*lists.ids.shape[:-1], columns)


def transposed(lists: Lists, *, columns: int, capacity: int) -> Lists:
    """Lists of the live rows per column, in time proportional to the table.

    Args:
        lists: per row, for one head: ids "i j".
        columns: number of columns.
        capacity: width of the answer; what does not fit is left out of ``ids``, while
            ``count`` stays true.
    """
    rows, width = lists.ids.shape
    kinds = entry_kinds(lists).reshape(-1)
    whole = (kinds == FULL).astype("int32")
    column = jnp.where(kinds > EMPTY, lists.ids.reshape(-1), columns)
    row = jnp.repeat(jnp.arange(rows, dtype="int32"), width)
    order = jnp.argsort(2 * column - whole, stable=True)
    column, row = column[order], row[order]
    count = jnp.zeros(columns, "int32").at[column].add(1, mode="drop")
    full = jnp.zeros(columns, "int32").at[column].add(whole[order], mode="drop")
    start = jnp.append(jnp.cumsum(count) - count, jnp.zeros(1, "int32"))
    slot = jnp.arange(rows * width, dtype="int32") - start[column]
    ids = jnp.zeros((columns, capacity), "int32").at[column, slot].set(row, mode="drop")
    return Lists(ids, count, full)


def is_traced(x: Any) -> bool:
    """Whether values are unknown while a program is being traced."""
    return isinstance(x, Tracer)


def check_blocks(ids: Any, count: Any, grid: Grid) -> None:
    """Raise ValueError where lists name blocks that are not there, or one twice."""
    if count.shape != ids.shape[:3]:
        raise ValueError(
            f"count of shape {count.shape}: must be {ids.shape[:3]}, one for each list"
            f" of ids {ids.shape}"
        )
    if ids.shape[2] != grid.rows:
        raise ValueError(
            f"ids of shape {ids.shape}: q_len={grid.q_len} in blocks of {grid.block_q}"
            f" has {grid.rows} rows"
        )
    if is_traced(ids) or is_traced(count):
        return
    ids, count = np.asarray(ids), np.asarray(count)
    width = ids.shape[-1]
    if count.min(initial=0) < 0 or count.max(initial=0) > width:
        raise ValueError(f"count must lie in 0..{width}, the width of ids")
    live = np.arange(width) < count[..., None]
    if (live & ((ids < 0) | (ids >= grid.columns))).any():
        raise ValueError(
            f"ids must lie in 0..{grid.columns - 1}: kv_len={grid.kv_len} in blocks of"
            f" {grid.block_kv}"
        )
    marked = np.sort(np.where(live, ids, -1 - np.arange(width)), axis=-1)
    if (marked[..., 1:] == marked[..., :-1]).any():
        raise ValueError("ids repeat within a row; list each block once")
