"""The gradient of a table as rows: what tokens read, in; distinct ids and values, out.

Under a mesh every device sums up what its own rows and columns receive from all tokens:
ids, weights and vectors travel, values stay, and all copies of a table agree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sparsejax.memory import sharded, tiles
from sparsejax.memory.table import Reads
from sparsejax.typing import Array, Float, Int

__all__ = ["Rows", "row_gradient"]


class Rows(NamedTuple):
    """Distinct rows of a table, ascending; padding names the row after the last.

    Under a mesh there are as many rows for every piece of the table, and ids count
    within the piece: they are for ``lazy.apply``, not for people.
    """

    ids: Int[Array, " u"]
    values: Float[Array, "u d"]  # float32; zeros in the padding


def row_gradient(reads: Reads, *, layers: int, slots: int) -> Rows:
    """Sum what each row receives, without an array of the table's shape.

    Args:
        reads: with ids ``layer * slots + row``; others add nothing.
        layers: that the table has rows of.
        slots: rows of one layer.
    """
    cut = sharded.ambient_cut(0, slots, reads.vectors.shape[1])
    if cut is None:
        return _summed(reads, slots=layers * slots)
    height = slots // sharded.parts(cut.rows)

    def local(reads: Reads) -> Rows:
        layer, row = jnp.divmod(reads.ids, slots)
        own = cut.own(row, height)
        exists = (layer >= 0) & (layer < layers) & (own < height)
        ids = jnp.where(exists, layer * height + own, layers * height)
        return _summed(reads._replace(ids=ids), slots=layers * height)

    inputs = Reads._make([P(), P(), P(None, cut.columns)])
    outputs = Rows._make([P(cut.rows), P(cut.rows, cut.columns)])
    return jax.shard_map(local, in_specs=(inputs,), out_specs=outputs)(reads)


# Elements of a table that an update has in flight: so many of it, of its moments and
# of the gradient fit into a core's cache. On CPU 2^20 takes two to three times as long.
TILE = 2**16


def tile_height(rows: int, width: int) -> int:
    """Say how many rows an update moves at a time."""
    return max(1, min(rows, TILE // width))


def _summed(reads: Reads, *, slots: int) -> Rows:
    count, width = min(reads.ids.size, slots), reads.vectors.shape[1]
    height = tile_height(count, width)
    count = max(1, -(-count // height)) * height
    exists = (reads.ids >= 0) & (reads.ids < slots)
    ids = jnp.where(exists, reads.ids, slots).reshape(-1)
    places = jnp.arange(ids.size, dtype=jnp.int32)
    ascending, origin = jax.lax.sort((ids, places), num_keys=1)
    starts = jnp.diff(ascending, prepend=-1) != 0
    rank = jnp.cumsum(starts, dtype=jnp.int32) - 1
    empty = jnp.full(count, slots, jnp.int32)
    distinct = empty.at[rank].set(ascending, mode="drop", indices_are_sorted=True)
    row = jnp.zeros_like(ids).at[origin].set(rank, unique_indices=True)
    row = jnp.where(exists, row.reshape(reads.ids.shape), count)
    values = tiles.add_rows(row, reads.weights, reads.vectors, slots=count)
    return Rows(distinct, values)
