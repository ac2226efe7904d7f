"""The best of many scores on Hopper GPUs, without a sort.

A warpgroup holds some scores of 64 tokens in registers, four threads to a token, and
takes their best again and again. What it looks at are the tops of sorted piles: a score
that is taken makes room for the next one of its pile. More scores than a warpgroup
holds are cut into parts, and the winners of all parts meet in the next round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import MATRIX, ROWS, load, spread

__all__ = ["MOST", "Ranked", "best"]

PILES, HEIGHT = 32, 4  # of a token in one program; a pile is sorted by insertion
PART = PILES * HEIGHT
MOST = PART // 2  # a round at least halves what is left
NONE = np.int32(2**31 - 1)  # a name that is none


class Ranked(NamedTuple):
    """Scores, and what they are the scores of."""

    scores: jax.Array  # "n w", float32
    names: jax.Array  # "n w", int32


def best(scores: jax.Array, names: jax.Array | None = None, *, k: int) -> Ranked:
    """Give the ``k`` best of every row, best first; ties go to the lower name.

    Args:
        scores: finite float32 "n w".
        names: int32 "n w"; without them, the numbers of the columns.
        k: at most ``w`` and ``MOST``.
    """
    n = scores.shape[0]
    scores = _whole(scores, -jnp.inf)
    names = None if names is None else _whole(names, NONE)
    found = _round(scores, names, k)
    while found.scores.shape[1] > k:
        found = _round(*map(_whole, found, (-jnp.inf, NONE)), k)
    return Ranked(*(x[:n] for x in found))


def _whole(x: jax.Array, value: Any) -> jax.Array:
    n, w = x.shape
    return jnp.pad(x, ((0, -n % ROWS), (0, -w % PART)), constant_values=value)


def _round(scores: jax.Array, names: jax.Array | None, k: int) -> Ranked:
    """The ``k`` best of every part: "n w" to "n (w / PART * k)"."""
    n, w = scores.shape

    def kernel(*refs: Any) -> None:
        *given, scores_ref, names_ref = refs
        part, tile = lax.axis_index("part"), lax.axis_index("tile")
        rows = pl.ds(tile * ROWS, ROWS)
        piles = [
            _level(given, rows, part * PART + level * PILES) for level in range(HEIGHT)
        ]
        for level in range(1, HEIGHT):
            for at in reversed(range(level)):
                piles[at : at + 2] = _in_order(*piles[at : at + 2])

        def take(number: Any, piles: list[Ranked]) -> list[Ranked]:
            top = piles[0]
            shape = top.scores.shape
            score = top.scores.max(axis=1)
            tied = top.scores == spread(score, shape, 0)
            name = jnp.where(tied, top.names, NONE).min(axis=1)
            scores_ref[part * k + number, rows] = score
            names_ref[part * k + number, rows] = name
            taken = top.names == spread(name, shape, 0)
            under = [*piles[1:], Ranked(jnp.full(shape, -jnp.inf), piles[-1].names)]
            return [
                Ranked(*(jnp.where(taken, b, a) for a, b in zip(x, y, strict=True)))
                for x, y in zip(piles, under, strict=True)
            ]

        lax.fori_loop(0, k, take, piles)

    shape = w // PART * k, n
    given = (scores,) if names is None else (scores, names)
    found = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, kind) for kind in ("float32", "int32")],
        grid=(w // PART, n // ROWS),
        grid_names=("part", "tile"),
    )(*given)
    return Ranked(*(x.T for x in found))


def _level(given: list[Any], rows: Any, start: Any) -> Ranked:
    """A score of every pile, with its name."""
    columns = pl.ds(start, PILES)
    scores, *names = (load(x.at[rows, columns], MATRIX, optimized=False) for x in given)
    if names:
        return Ranked(scores, *names)
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
    return Ranked(scores, start + column)


def _in_order(a: Ranked, b: Ranked) -> tuple[Ranked, Ranked]:
    """Exchange two levels where the lower one is better."""
    tied = (a.scores == b.scores) & (b.names < a.names)
    worse = (a.scores < b.scores) | tied
    both = [*zip(a, b, strict=True)]
    return (
        Ranked(*(jnp.where(worse, y, x) for x, y in both)),
        Ranked(*(jnp.where(worse, x, y) for x, y in both)),
    )
