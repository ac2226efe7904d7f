"""The best pairs of two halves on TPUs, without a sort.

Tokens lie on lanes and scores on sublanes: then the best of all scores is a maximum of
whole registers, and every token of a tile takes it in the same pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["TOKENS", "best_pairs"]

TOKENS = 128  # of a tile
SUBLANES = 8
NONE = np.int32(2**31 - 1)  # a slot that is none


def best_pairs(rows: jax.Array, columns: jax.Array, *, k: int) -> jax.Array:
    """Give the slots ``i * r + j`` of the largest sums "h k n"; ties to the lower slot.

    Args:
        rows: finite float32 scores "h r n"; ``n`` is a multiple of ``TOKENS``.
        columns: the other half's.
        k: slots of a token, at most ``r * r``.
    """
    heads, r, n = rows.shape
    filled = [
        jnp.pad(x, ((0, 0), (0, -r % SUBLANES), (0, 0)), constant_values=-jnp.inf)
        for x in (rows, columns)
    ]
    spans = _spans(k, min(k, r))
    block = pl.BlockSpec(
        (None, filled[0].shape[1], TOKENS), lambda h, t: (h, np.int32(0), t)
    )
    ranks = _whole(min(k, r))
    scratch = [(filled[0].shape[1], TOKENS), (2, ranks, TOKENS), (2, ranks, TOKENS)]
    scratch += [(sum(map(_whole, spans)), TOKENS)] * 2
    kinds = jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.int32
    return pl.pallas_call(
        functools.partial(_kernel, r=r, k=k, spans=spans),
        grid=(heads, n // TOKENS),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((None, k, TOKENS), lambda h, t: (h, np.int32(0), t)),
        out_shape=jax.ShapeDtypeStruct(
            (heads, k, n), jnp.int32, manual_axis_type=jax.typeof(rows).manual_axis_type
        ),
        scratch_shapes=[
            pltpu.VMEM(shape, kind) for shape, kind in zip(scratch, kinds, strict=True)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
    )(*filled)


def _whole(count: int) -> int:
    return -(-count // SUBLANES) * SUBLANES


def _spans(k: int, ranks: int) -> list[int]:
    """How many of the second half can win beside number 0, 1, … of the first."""
    return [min(ranks, k // (a + 1)) for a in range(ranks)]


def _number(shape: tuple[int, ...]) -> Any:
    return lax.broadcasted_iota(jnp.int32, shape, 0)


def _kernel(  # noqa: PLR0913  refs of one call of pallas
    rows: Any,
    columns: Any,
    found: Any,
    left: Any,
    best: Any,
    places: Any,
    sums: Any,
    slots: Any,
    *,
    r: int,
    k: int,
    spans: list[int],
) -> None:
    for side, half in enumerate((rows, columns)):
        left[...] = half[...]

        def pick(n: Any, _: None, side: int = side) -> None:
            scores, number = left[...], _number(left.shape)
            top = scores.max(axis=0, keepdims=True)
            at = jnp.where(scores == top, number, NONE).min(axis=0, keepdims=True)
            best[side, pl.ds(n, 1), :] = top
            places[side, pl.ds(n, 1), :] = at
            left[...] = jnp.where(number == at, -jnp.inf, scores)

        lax.fori_loop(0, len(spans), pick, None)

    start = 0
    for a, count in enumerate(spans):
        end = start + _whole(count)
        live = _number((end - start, TOKENS)) < count
        pair = best[0, a : a + 1, :] + best[1, : end - start, :]
        slot = places[0, a : a + 1, :] * np.int32(r) + places[1, : end - start, :]
        sums[start:end, :] = jnp.where(live, pair, -jnp.inf)
        slots[start:end, :] = jnp.where(live, slot, NONE)
        start = end

    def choose(n: Any, _: None) -> None:
        scores, names = sums[...], slots[...]
        top = scores.max(axis=0, keepdims=True)
        at = jnp.where(scores == top, names, NONE).min(axis=0, keepdims=True)
        found[pl.ds(n, 1), :] = at
        sums[...] = jnp.where(names == at, -jnp.inf, scores)
        slots[...] = jnp.where(names == at, NONE, names)

    lax.fori_loop(0, k, choose, None)
