"""Grouped matrix products on TPUs: a grid that walks pairs of row tiles and groups.

A tile that several groups share is visited once for each, and sums are masked by row.
Tiles past the groups, and empty groups, have one visit without a product, which writes
their zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.blocks import NN, NT, TN, product
from pallas_kernels.tpu.pairs import (
    BITS,
    FIRST,
    FULL,
    KIND,
    LAST,
    PARTIAL,
    Pairs,
    Rows,
    pair_list,
)

__all__ = ["Tiling", "rows_by_rows", "rows_by_weights"]

VMEM = 64 * 2**20
KINDS = (1 << (BITS - KIND)) - 1


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of blocks, which divide those of the arrays."""

    rows: int
    width: int  # of "d"
    hidden: int  # of "f"


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
        x: rows; "m f" if turned.
        w: "e d f".
        group_sizes: int32, at most ``m`` together.
        tiling: sizes of blocks.
        turned: whether weights are contracted over their last axis, giving "m d".
    """
    counts = len(x) // tiling.rows, len(w)
    visits = _Visits.of(group_sizes, counts[0], tiling.rows)
    pairs = visits.pairs(visits.tiles, visits.groups, counts)
    inner, outer = (tiling.width, tiling.hidden)[:: -1 if turned else 1]
    width = w.shape[1 if turned else 2]

    def x_at(j: Any, n: Any, k: Any, words: Any, *_: Any) -> Any:
        del j
        return words[n] >> BITS, k

    def w_at(j: Any, n: Any, k: Any, _: Any, others: Any, *__: Any) -> Any:
        return (others[n], j, k) if turned else (others[n], k, j)

    def y_at(j: Any, n: Any, k: Any, words: Any, *_: Any) -> Any:
        del k
        return words[n] >> BITS, j

    def body(visit: Any, x: Any, w: Any) -> Any:
        part = product(x[...], w[...], NT if turned else NN)
        # The product is masked, not the rows: 0 times a weight need not be 0.
        return part if visit is None else jnp.where(visit(part.shape), part, 0.0)

    return _launch(
        body,
        pairs,
        visits.ends,
        grid=lambda total: (width // outer, total, x.shape[1] // inner),
        axis=1,
        specs=[
            pl.BlockSpec((tiling.rows, inner), x_at),
            pl.BlockSpec((None, tiling.width, tiling.hidden), w_at),
        ],
        operands=(x, w),
        shape=(len(x), width),
        block=(tiling.rows, outer),
        at=y_at,
    )


def rows_by_rows(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, tiling: Tiling
) -> jax.Array:
    """Give ``x.T @ dy`` of each group, "e d f"; 0 for an empty one.

    Args:
        x: rows "m d".
        dy: rows "m f".
        group_sizes: int32, at most ``m`` together.
        tiling: sizes of blocks.
    """
    counts = len(group_sizes), len(x) // tiling.rows
    visits = _Visits.of(group_sizes, counts[1], tiling.rows)
    pairs = visits.pairs(visits.groups, visits.tiles, counts)

    def x_at(i: Any, j: Any, n: Any, _: Any, others: Any, *__: Any) -> Any:
        del j
        return others[n], i

    def dy_at(i: Any, j: Any, n: Any, _: Any, others: Any, *__: Any) -> Any:
        del i
        return others[n], j

    def dw_at(i: Any, j: Any, n: Any, words: Any, *_: Any) -> Any:
        return words[n] >> BITS, i, j

    def body(visit: Any, *refs: Any) -> Any:
        rows = [ref[...] for ref in refs]
        if visit is not None:
            # Both: what other groups hold need not give 0 when multiplied by 0.
            rows = [jnp.where(visit(a.shape), a, jnp.zeros_like(a)) for a in rows]
        return product(*rows, TN)

    shape = len(group_sizes), x.shape[1], dy.shape[1]
    block = tiling.width, tiling.hidden
    return _launch(
        body,
        pairs,
        visits.ends,
        grid=lambda total: (shape[1] // block[0], shape[2] // block[1], total),
        axis=2,
        specs=[
            pl.BlockSpec((tiling.rows, tiling.width), x_at),
            pl.BlockSpec((tiling.rows, tiling.hidden), dy_at),
        ],
        operands=(x, dy),
        shape=shape,
        block=block,
        at=dw_at,
    )


class _Visits(NamedTuple):
    """Which tile meets which group, in order: both columns ascend.

    There are at most ``tiles + groups - 1`` visits; past them, both sides are one past
    the last.
    """

    ends: jax.Array  # of the groups, after a 0
    tiles: jax.Array
    groups: jax.Array
    kinds: jax.Array

    @classmethod
    def of(cls, group_sizes: jax.Array, tiles: int, tile: int) -> "_Visits":
        """Meet the groups one after the other."""
        count, sizes = len(group_sizes), group_sizes.astype("int32")
        ends = jnp.cumsum(sizes, dtype="int32")
        starts = ends - sizes
        meets = jnp.where(sizes > 0, (ends - 1) // tile - starts // tile + 1, 0)
        last = jnp.cumsum(meets, dtype="int32")
        n = jnp.arange(tiles + count, dtype="int32")
        group = jnp.searchsorted(last, n, side="right").astype("int32")
        known = jnp.minimum(group, count - 1)
        visited = starts[known] // tile + n - (last - meets)[known]
        visited = jnp.where(group < count, visited, tiles)
        low, high = visited * tile, (visited + 1) * tile
        inside = (starts[known] <= low) & (ends[known] >= high)
        kinds = jnp.where(inside, FULL, PARTIAL)
        bounds = jnp.concatenate([jnp.zeros(1, "int32"), ends])
        return cls(bounds, visited, group, kinds)

    def pairs(
        self, own: jax.Array, others: jax.Array, counts: tuple[int, int]
    ) -> Pairs:
        """List the visits by their own side; ``counts`` of it and of the other."""
        start = jnp.searchsorted(own, jnp.arange(counts[0] + 1)).astype("int32")
        # Even a row without visits fetches some block, so all of them exist.
        others = jnp.minimum(others, counts[1] - 1)
        rows = Rows(start[:-1], jnp.diff(start), others, self.kinds)
        return pair_list(rows, len(own) + counts[0])


def _launch(  # noqa: PLR0913  one call of pallas, spelled out
    body: Callable[..., Any],
    pairs: Pairs,
    ends: jax.Array,
    *,
    grid: Callable[[Any], tuple[Any, ...]],
    axis: int,
    specs: list[pl.BlockSpec],
    operands: tuple[jax.Array, jax.Array],
    shape: tuple[int, ...],
    block: tuple[int, int],
    at: Callable[..., Any],
) -> jax.Array:
    """Run ``body(visit, *refs)`` over the pairs and store the sum of each row of them.

    Args:
        body: a part of the sum; ``visit`` tells live rows, or is None for all of them.
        pairs: what is walked.
        ends: of the groups, after a 0.
        grid: from the number of pairs.
        axis: of the grid along which pairs lie.
        specs: blocks of the operands.
        operands: arrays.
        shape: of the result.
        block: of the result, over its last axes.
        at: which block a step writes.
    """
    steps = len(grid(pairs.total)) - 1

    def kernel(words: Any, others: Any, ends: Any, *refs: Any) -> None:
        *given, result, total = refs
        n = pl.program_id(axis)
        word, kind = words[n], (words[n] >> KIND) & np.int32(KINDS)
        first, last = word & FIRST != 0, word & LAST != 0
        if axis < steps:  # each pair takes the steps of the axes behind it
            first &= pl.program_id(steps) == 0
            last &= pl.program_id(steps) == pl.num_programs(steps) - 1
        own, other = word >> BITS, others[n]
        tile, group = (own, other) if axis < steps else (other, own)

        def visit(shape: tuple[int, ...]) -> Any:
            row = tile * np.int32(given[0].shape[0]) + lax.broadcasted_iota(
                jnp.int32, shape, 0
            )
            return (row >= ends[group]) & (row < ends[group + 1])

        @pl.when(first)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.when(kind == FULL)
        def _() -> None:
            total[...] += body(None, *given)

        @pl.when(kind == PARTIAL)
        def _() -> None:
            total[...] += body(visit, *given)

        @pl.when(last)
        def _() -> None:
            result[...] = total[...].astype(result.dtype)

    spec = pl.BlockSpec((*[None] * (len(shape) - 2), *block), at)
    parallel = "parallel" if axis == steps else "arbitrary"
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid(pairs.total),
            in_specs=specs,
            out_specs=spec,
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
        ),
        # Under a mesh all operands vary alike, and so does the result.
        out_shape=jax.ShapeDtypeStruct(
            shape,
            operands[0].dtype,
            manual_axis_type=jax.typeof(operands[0]).manual_axis_type,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", parallel, "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
    )
    return call(pairs.words, pairs.others, ends, *operands)
