"""Lists of live block pairs: what the kernels walk, one grid step for each pair.

A pair joins a block of the output, its *row*, with a block of the other side. Pairs of
a row are consecutive, because an output block that is left is written and lost. A row
without live blocks has one EMPTY pair, or its output would never be written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

__all__ = ["BITS", "EMPTY", "FULL", "PARTIAL", "RULES", "Pairs", "Rows", "pair_list"]

# A block's kind: PARTIAL + n is partial under rule n.
EMPTY, FULL, PARTIAL = 0, 1, 2
FIRST, LAST, KIND = 1, 2, 2  # two flags, and where the kind begins
BITS = 10  # of flags and kind; the row is above them
RULES = (1 << (BITS - KIND)) - PARTIAL


class Rows(NamedTuple):
    """Live blocks by row: row ``n`` has the ``count[n]`` entries from ``start[n]``."""

    start: Int[Array, " rows"]
    count: Int[Array, " rows"]
    others: Int[Array, " entries"]
    kinds: Int[Array, " entries"]


class Pairs(NamedTuple):
    """One word for each pair, ``row, kind, last, first`` from the top, and its other.

    Only the first ``total`` are walked; there is at least one more, so that looking
    ahead stays inside.
    """

    words: Int[Array, " capacity"]
    others: Int[Array, " capacity"]
    total: Int[Array, ""]


def pair_list(rows: Rows, capacity: int) -> Pairs:
    """List the pairs of all rows; ``capacity`` bounds live blocks plus empty rows."""
    size = capacity + 1
    visits = jnp.maximum(rows.count, 1)
    ends = jnp.cumsum(visits, dtype="int32")
    index = jnp.arange(len(visits), dtype="int32")
    row = jnp.repeat(index, visits, total_repeat_length=size)
    step = jnp.arange(size, dtype="int32")
    place = step - (ends - visits)[row]
    live = place < rows.count[row]
    entry = jnp.where(live, rows.start[row] + place, 0)
    kind = jnp.where(live, rows.kinds[entry], EMPTY)
    last = (place == visits[row] - 1).astype("int32")
    flags = kind << KIND | last << 1 | (place == 0).astype("int32")
    # An empty row repeats the block before it: nothing is fetched for it.
    known = jax.lax.cummax(jnp.where(live, step, 0))
    # A grid that runs past the list would read past scalar memory.
    total = jnp.minimum(ends[-1], capacity)
    return Pairs(row << BITS | flags, rows.others[entry][known], total)
