"""Segments meet block masks: blocks between documents die, blocks within one stay."""

import jax.numpy as jnp

from sparsejax.attention import lists as ls
from sparsejax.attention.attended import Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.typing import Array, Int

__all__ = ["restrict"]

_LAST = 2**31 - 1


def restrict(mask: BlockMask, segments: Segments) -> BlockMask:
    """Drop the blocks that no segment shares; full ones that mix segments get a rule.

    The lists become one per batch element. Judged by the range of segment numbers in
    each block, so documents packed in order leave exactly their own blocks alive.
    """
    grid = mask.grid
    low, high, whole = _ranges(segments.q, grid.rows, grid.block_q)
    left, right, single = _ranges(segments.kv, grid.columns, grid.block_kv)
    batch = jnp.arange(low.shape[0], dtype="int32")[:, None, None, None]
    old = ls.entry_kinds(mask.lists)
    ids = jnp.where(old > ls.EMPTY, jnp.asarray(mask.ids), 0)
    ids = jnp.broadcast_to(ids, (low.shape[0], *ids.shape[1:]))
    rows = low[:, None, :, None], high[:, None, :, None], whole[:, None, :, None]
    some = (rows[0] <= right[batch, ids]) & (left[batch, ids] <= rows[1])
    every = rows[2] & single[batch, ids] & (rows[1] == right[batch, ids])
    kinds = jnp.minimum(ls.as_kinds(ls.Cover(some, every)), old)
    return mask.replace(**ls.ordered(kinds, ids)._asdict())


def _ranges(numbers: Int[Array, "b t"], blocks: int, width: int) -> tuple:
    """Least and greatest nonzero number of each block, and whether it has no other."""
    edge = blocks * width - numbers.shape[1]
    # The padding repeats the last number: it must not spoil a block that is one piece.
    numbers = jnp.pad(numbers, [(0, 0), (0, edge)], mode="edge")
    numbers = numbers.reshape(-1, blocks, width)
    low = jnp.where(numbers == 0, _LAST, numbers).min(axis=-1)
    high = jnp.where(numbers == 0, -_LAST, numbers).max(axis=-1)
    return low, high, (numbers != 0).all(axis=-1) & (low == high)
