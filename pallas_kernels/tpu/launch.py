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
    """What is written for each row of the list."""

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
    """Run a body over the list; outputs have one block for each row, "o r *block".

    Args:
        body: called as ``body(tensors, outputs, scratch, tiling)`` with refs.
        where: absolute position of the first query, and the list's first row.
        scratch: shapes of float32 accumulators.
        by_key: whether rows are key blocks, else query blocks.
    """
    rows = tensors.k if by_key else tensors.q
    outer, inner = len(tensors.k), len(tensors.q) // len(tensors.k)
    place = functools.partial(locate, by_key=by_key)

    def spec(x: Any, side: int) -> pl.BlockSpec:
        def index(*args: Any) -> tuple[Any, ...]:
            *ids, where, words, others = args
            at = place(ids, where[1], words, others)
            return _index(at, x.shape, side, inner, tiling)

        return pl.BlockSpec((*[None] * (x.ndim - 2), *x.shape[-2:]), index)

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

    # Under a mesh all operands vary alike, and so do the outputs.
    varying, lead = jax.typeof(rows).manual_axis_type, rows.shape[:2]
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
    at: Place, shape: tuple[int, ...], side: int, inner: int, tiling: Tiling
) -> tuple[Any, ...]:
    """Which block of an array a grid step works on."""
    zero = np.int32(0)  # a Python 0 would be 64 bits wide under jax_enable_x64
    if side == QUERY:
        return at.outer * np.int32(inner) + at.inner, at.query, zero, zero
    if side == KEY:
        return at.outer, at.key, zero, zero
    block, row = _divided(at.row, tiling.rows)
    batch, head = _divided(block, tiling.heads)
    column = lax.rem(at.column, np.int32(tiling.columns))
    batch, head = lax.rem(batch, np.int32(shape[0])), lax.rem(head, np.int32(shape[1]))
    # Full blocks all name one tile, so that none is fetched for them.
    tile = [jnp.where(at.kind >= PARTIAL, x, zero) for x in (batch, head, row, column)]
    return *tile, zero, zero


def _divided(n: Any, size: int) -> tuple[Any, Any]:
    return lax.div(n, np.int32(size)), lax.rem(n, np.int32(size))


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
