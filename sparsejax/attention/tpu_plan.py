"""How a call of attention becomes the parts, blocks and lists of the TPU kernels.

Axes of the kernels: o parts that share a list, r blocks of a list, q and k rows of a
block. Parts are batch elements and heads that follow the same lists; those with lists
of their own, and the blocks of each, are the rows of one list.

This is the order "b h t c": XLA then writes the arrays that way where they are made,
and a cache of keys in a loop is kept that way. Reading "b s (g c)" in place instead,
without heads outside, costs a copy at every step, for no tile of memory spans heads.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.tpu.blocks import Tiling
from sparsejax.attention import lists as ls
from sparsejax.attention.mask import BlockMask
from sparsejax.typing import Array

__all__ = ["SUBLANES", "Limit", "Plan", "pad", "plan_of"]

PAIRS = 130_000  # that fit into the scalar memory of every generation
PACKED = 512  # queries of a block, as far as heads are packed into it
SUBLANES = 8  # of a vector register; blocks are padded to whole ones


class Limit(NamedTuple):
    """Into how many calls a list is cut, and what bounds the pairs of each."""

    parts: int
    capacity: int


class Plan(NamedTuple):
    """How "b t h c" and "b s g c" become the kernels' parts and blocks."""

    batches: tuple[int, int]  # that share lists, times those with lists of their own
    heads: tuple[int, int, int]  # sharing lists, with own lists, packed into a block
    keys: tuple[int, int]  # key heads of different parts, times those of one
    height: int  # rows of a query block
    depth: int  # rows of a key block
    tiling: Tiling
    rows: Limit
    columns: Limit

    def queries(self, x: Array, fill: float = 0.0) -> Array:
        """[b, t, h, c] to [o, r, q, c]."""
        (apart, own), (outer, inner, packed) = self.batches, self.heads
        rows, block_q = self.tiling.rows, self.tiling.block_q
        x = pad(x, 1, rows * block_q, fill)
        x = x.reshape(apart, own, rows, block_q, outer, inner, packed, -1)
        x = x.transpose(0, 4, 1, 5, 2, 6, 3, 7)
        x = x.reshape(apart * outer, own * inner * rows, packed * block_q, -1)
        return pad(x, 2, self.height, fill)

    def from_queries(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[o, r, q, c] to [b, t, h, c]."""
        (apart, own), (outer, inner, packed) = self.batches, self.heads
        rows, block_q = self.tiling.rows, self.tiling.block_q
        x = x[:, :, : packed * block_q]
        x = x.reshape(apart, outer, own, inner, rows, packed, block_q, -1)
        x = x.transpose(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(shape[0], rows * block_q, *shape[2:])[:, : shape[1]]

    def kv(self, x: Array) -> Array:
        """[b, s, g, c] to [o, r, k, c]."""
        (apart, own), (outer, inner) = self.batches, self.keys
        columns, block_kv = self.tiling.columns, self.tiling.block_kv
        x = pad(x, 1, columns * block_kv)
        x = x.reshape(apart, own, columns, block_kv, outer, inner, -1)
        x = x.transpose(0, 4, 1, 5, 2, 3, 6)
        x = x.reshape(apart * outer, own * inner * columns, block_kv, -1)
        return pad(x, 2, self.depth)

    def from_kv(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[o, r, k, c] to [b, s, g, c]."""
        (apart, own), (outer, inner) = self.batches, self.keys
        columns, block_kv = self.tiling.columns, self.tiling.block_kv
        x = x[:, :, :block_kv].reshape(apart, outer, own, inner, columns, block_kv, -1)
        x = x.transpose(0, 2, 4, 5, 1, 3, 6)
        return x.reshape(shape[0], columns * block_kv, *shape[2:])[:, : shape[1]]


def plan_of(
    q: Array, k: Array, mask: BlockMask, scale: float, softcap: float | None
) -> Plan:
    """Lay out a call.

    Raises:
        ValueError: if its lists do not fit the chip, however they are cut.
    """
    (b, _, h, _), g, grid = q.shape, k.shape[2], mask.grid
    own, inner = mask.ids.shape[:2]
    packed = 1
    if mask.elements is not None:
        own, inner = max(own, len(mask.elements)), max(inner, mask.elements.shape[1])
    elif inner == 1:
        fitting = max(1, PACKED // grid.block_q)
        packed = max(
            p for p in range(1, h // g + 1) if h // g % p == 0 and p <= fitting
        )
    shared = inner == 1
    heads = (h // packed, 1, packed) if shared else (1, h, 1)
    keys = (g, 1) if shared else (1, g)
    tiling = Tiling(
        heads=inner,
        rows=grid.rows,
        columns=grid.columns,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        kv_len=grid.kv_len,
        scale=scale,
        softcap=softcap,
        rules=mask.patterns,
    )
    rows, columns = _limits(mask, own * inner, own * keys[1])
    return Plan(
        batches=(b // own, own),
        heads=heads,
        keys=keys,
        height=_round_up(packed * grid.block_q),
        depth=_round_up(grid.block_kv),
        tiling=tiling,
        rows=rows,
        columns=columns,
    )


def _limits(mask: BlockMask, lists: int, key_lists: int) -> tuple[Limit, Limit]:
    """Cut the lists so that each call's pairs fit into scalar memory."""
    grid = mask.grid
    rows, columns = lists * grid.rows, key_lists * grid.columns
    live = rows * mask.ids.shape[-1]
    if not ls.is_traced(mask.count):
        copies = rows // np.asarray(mask.count).size
        live = int(np.asarray(mask.count).sum()) * copies

    def limit(size: int, widest: int, name: str) -> Limit:
        for parts in (n for n in range(1, size + 1) if size % n == 0):
            some = size // parts
            # Each row has a pair even if it has nothing live.
            capacity = min(live + some, some * max(widest, 1))
            if capacity <= PAIRS:
                return Limit(parts, capacity)
        raise ValueError(
            f"a {name} block has up to {widest} live blocks, and a TPU call takes at"
            f" most {PAIRS} pairs; choose larger blocks"
        )

    widest = mask.ids.shape[-1]
    readers = lists // key_lists * grid.rows
    return limit(rows, widest, "query"), limit(columns, readers, "key")


def _round_up(size: int) -> int:
    return -(-size // SUBLANES) * SUBLANES


def pad(x: Array, axis: int, length: int, fill: float = 0.0) -> Array:
    """Lengthen an axis."""
    edges = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, edges, constant_values=np.asarray(fill, x.dtype))
