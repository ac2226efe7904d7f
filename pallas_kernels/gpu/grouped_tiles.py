"""Where the tiles of grouped products lie, from traced group sizes.

Copies into swizzled shared memory start at multiples of 8 rows, so a group is tiled
from the last such row at or before its own first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["ALIGNED", "Spans", "Tiles", "row_spans", "row_tiles"]

ALIGNED = 8


class Tiles(NamedTuple):
    """Tiles of rows: the first ``count[0]``; the last pseudo-group is what is left."""

    count: jax.Array  # "1"
    group: jax.Array  # "n"
    row: jax.Array  # "n": first row, a multiple of 8
    low: jax.Array  # "n": live rows are [low, high)
    high: jax.Array


class Spans(NamedTuple):
    """Rows of each group, walked by some at a step."""

    first: jax.Array  # "e": where steps start, a multiple of 8
    low: jax.Array  # "e": live rows are [low, high)
    high: jax.Array
    steps: jax.Array


def row_tiles(group_sizes: jax.Array, rows: int, tile: int) -> Tiles:
    """Cut groups, and the rows past them, into tiles; every row is live in one."""
    start, end = _bounds(group_sizes)
    start = jnp.append(start, end[-1])
    end = jnp.append(end, rows)
    first = start // ALIGNED * ALIGNED
    visits = jnp.where(end > start, -((first - end) // tile), 0)
    last = _running_sum(visits)
    # A group that is not empty has at most (size + 7 + tile - 1) / tile tiles.
    capacity = (rows + len(start) * (tile + ALIGNED - 2)) // tile
    n = jnp.arange(capacity, dtype="int32")
    group = (last[None] <= n[:, None]).sum(1, dtype="int32")
    at = jnp.minimum(group, len(start) - 1)
    row = first[at] + (n - (last - visits)[at]) * tile
    low, high = jnp.maximum(start[at], row), jnp.minimum(end[at], row + tile)
    row = jnp.minimum(row, rows - tile)  # all reads stay inside
    return Tiles(last[-1:], at, row, low, high)


def row_spans(group_sizes: jax.Array, step: int) -> Spans:
    """Give the rows of each group in steps."""
    start, end = _bounds(group_sizes)
    first = start // ALIGNED * ALIGNED
    steps = jnp.where(end > start, -((first - end) // step), 0)
    return Spans(first, start, end, steps)


def _bounds(group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    sizes = group_sizes.astype("int32")
    ends = _running_sum(sizes)
    return ends - sizes, ends


def _running_sum(x: jax.Array) -> jax.Array:
    """Sum along a short vector in one small kernel, where a scan would take several."""
    n = jnp.arange(len(x))
    return jnp.where(n[None] <= n[:, None], x[None], 0).sum(1, dtype="int32")
