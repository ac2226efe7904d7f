"""The one skeleton of all kernels: a grid that walks a list of pairs.

A kernel is a *body*: given the refs of a grid step it returns what to do when a row of
pairs begins, at each live pair, and when the row ends. Accumulators live in scratch
memory, which outlasts a step; outputs are written at the end of a row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.blocks import Place, Tensors, Tiling, locate, seen
from pallas_kernels.tpu.pairs import FIRST, FULL, LAST, PARTIAL, Pairs

__all__ = ["Body", "Output", "launch"]

# start(), step(visible), finish()
Body = tuple[Callable[[], None], Callable[[Any], None], Callable[[], None]]
# Blocks of 1024 x 1024 spill more than the default of the oldest chips allows.
VMEM = 32 * 2**20

QUERY, KEY, ELEMENT = range(3)
SIDES = Tensors(
    **dict.fromkeys(("q", "do", "lse", "delta", "q_segments", "grants"), QUERY),
    **dict.fromkeys(("k", "v", "kv_segments", "bias"), KEY),
    elements=ELEMENT,
)


class Output(NamedTuple):
    """One block for each row of the list."""

    block: tuple[int, int]
    dtype: Any


def launch(
    body: Callable[..., Body],
    pairs: Pairs,
    where: jax.Array,
    tensors: Tensors,
    outputs: tuple[Output, ...],
    scratch: tuple[tuple[int, int], ...],
    *,
    tiling: Tiling,
    by_key: bool,
) -> list[jax.Array]:
    """Run a body over the list; outputs are "o r *block" of the rows' side.

    Args:
        body: called as ``body(tensors, outputs, scratch, tiling)`` with refs.
        where: absolute position of the first query, and the list's first row.
        scratch: shapes of float32 accumulators.
        by_key: whether rows are key blocks, else query blocks.
    """
    side = tensors.k if by_key else tensors.q
    outer, inner = len(tensors.k), len(tensors.q) // len(tensors.k)
    place = functools.partial(locate, by_key=by_key)

    def spec(x: Any, kind: int) -> pl.BlockSpec:
        lead = x.ndim - 2
        index = functools.partial(_index, place, kind, inner, x.shape[:2], tiling)
        return pl.BlockSpec((*[None] * lead, *x.shape[lead:]), index)

    def kernel(where: Any, words: Any, others: Any, tensors: Any, *refs: Any) -> None:
        ids = [pl.program_id(axis) for axis in range(3)]
        at = place(ids, where[1], words, others)
        results, accumulators = refs[: len(outputs)], refs[len(outputs) :]
        _walk(
            at,
            body(tensors, results, accumulators, tiling),
            functools.partial(seen, at, where[0], tensors, tiling),
            turns=inner if by_key else 1,
        )

    lead = side.shape[:2]
    # Under a mesh all operands vary alike, and so do the outputs.
    varying = jax.typeof(side).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct((*lead, *x.block), x.dtype, manual_axis_type=varying)
        for x in outputs
    ]
    specs = [spec(x, KEY if by_key else QUERY) for x in shapes]
    inputs = Tensors(
        *[
            None if x is None else spec(x, s)
            for x, s in zip(tensors, SIDES, strict=True)
        ]
    )
    grid = (outer, pairs.total, inner) if by_key else (outer, inner, pairs.total)
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[inputs],
            out_specs=specs,
            scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
    )
    return list(call(where, pairs.words, pairs.others, tensors))


def _index(
    place: Any, kind: int, inner: int, sizes: tuple, tiling: Tiling, *args: Any
) -> tuple[Any, ...]:
    """Which block of an array a grid step works on."""
    *ids, where, words, others = args
    at: Place = place(ids, where[1], words, others)
    zero = np.int32(0)  # a Python 0 would be 64 bits wide under jax_enable_x64
    if kind == QUERY:
        return at.outer * np.int32(inner) + at.inner, at.query, zero, zero
    if kind == KEY:
        return at.outer, at.key, zero, zero
    head, row = (f(at.row, np.int32(tiling.rows)) for f in (lax.div, lax.rem))
    batch, head = (f(head, np.int32(tiling.heads)) for f in (lax.div, lax.rem))
    column = lax.rem(at.column, np.int32(tiling.columns))
    # Full blocks all name one tile, so that none is fetched for them.
    index = [
        jnp.where(at.kind >= PARTIAL, x, zero)
        for x in (
            lax.rem(batch, np.int32(sizes[0])),
            lax.rem(head, np.int32(sizes[1])),
            row,
            column,
        )
    ]
    return *index, zero, zero


def _walk(at: Place, body: Body, visible: Callable[..., Any], *, turns: int) -> None:
    """Begin a row, take the step of the pair's kind, end the row.

    Args:
        turns: grid steps that each pair takes, ``at.inner`` counting them.
    """
    start, step, finish = body
    begins, ends = at.word & FIRST != 0, at.word & LAST != 0
    if turns > 1:
        begins, ends = begins & (at.inner == 0), ends & (at.inner == turns - 1)
    pl.when(begins)(start)
    pl.when(at.kind == FULL)(lambda: step(visible(ruled=False)))
    pl.when(at.kind >= PARTIAL)(lambda: step(visible(ruled=True)))
    pl.when(ends)(finish)
