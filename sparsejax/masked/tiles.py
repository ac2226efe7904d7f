"""Structures whose masks are patterns of tiles; their contract is ``structures``'s."""

import itertools
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["Butterfly", "Transposable"]


@dataclass(frozen=True, kw_only=True)
class Transposable:
    """Keep n of each m weights along both of two axes, in tiles of m by m.

    Every tile takes the best of all its patterns (90 for two of four). A tile avoids
    weights that score -inf before anything else.

    Source: Hu et al. 2024, arXiv:2404.01847, Sec. 5.1.

    >>> Transposable(m=2)(jnp.array([[1.0, 3.0], [3.0, 1.0]]), 2).tolist()
    [[False, True], [True, False]]
    """

    m: int = 4  # sides of a tile: the patterns of larger ones are too many
    axes: tuple[int, ...] = (0, -1)  # counted without the stack axes

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give m for every tile: a weight more in each of its rows and columns.

        Raises:
            ValueError: if ``m`` does not divide the two axes.
        """
        inside = all(-len(shape) <= axis < len(shape) for axis in self.axes)
        different = inside and len({axis % len(shape) for axis in self.axes}) == 2
        fits = different and len(self.axes) == 2 and 1 <= self.m <= 4
        if not fits or any(shape[axis] % self.m for axis in self.axes):
            raise ValueError(
                f"transposable(m={self.m}, axes={self.axes}) needs two different axes"
                f" divisible by m, m at most 4, got shape {shape}; choose other axes or"
                " m, or exclude it"
            )
        return math.prod(shape) // self.m

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the best pattern of every tile with ``keep / tiles / m`` in a row."""
        each = keep // max(self.quantum(scores.shape), 1)
        last = jnp.moveaxis(scores, self.axes, (-2, -1))
        side, width = last.shape[-2] // self.m, last.shape[-1] // self.m
        cut = last.reshape(-1, side, self.m, width, self.m).swapaxes(2, 3)
        live = self._patterns_of(cut.reshape(-1, self.m**2), each).reshape(cut.shape)
        mask = live.swapaxes(2, 3).reshape(last.shape)
        return jnp.moveaxis(mask, (-2, -1), self.axes)

    def _patterns_of(self, tiles: Array, each: int | Array) -> Array:
        patterns = _patterns(self.m)
        flat = jnp.asarray(patterns.reshape(-1, self.m**2), jnp.float32)
        lowest = jnp.isnan(tiles) | jnp.isneginf(tiles)
        # A sixteenth of each: sums stay finite.
        limit = jnp.float32(jnp.finfo(jnp.float32).max / 16)
        finite = jnp.where(lowest, 0, jnp.clip(tiles, -limit, limit))
        bad = jnp.where(lowest, 1.0, 0.0) @ flat.T
        bad = jnp.where(patterns[:, 0].sum(-1) == each, bad, jnp.inf)
        allowed = bad == jnp.min(bad, axis=-1, keepdims=True)
        total = jnp.where(
            allowed, jnp.matmul(finite, flat.T, precision="highest"), -jnp.inf
        )
        return jnp.asarray(patterns).reshape(-1, self.m**2)[jnp.argmax(total, axis=-1)]


@dataclass(frozen=True, kw_only=True)
class Butterfly:
    """Keep the blocks that a product of butterfly matrices would fill; scores are moot.

    On a square grid of blocks, ``i xor j`` is 0, then a power of two, one more with
    every budget step, and only then any other number. On an oblong grid the pattern of
    the shorter side is stretched. ``keep`` of one block a row is a block diagonal.

    Source: Dao et al. 2021, arXiv:2112.00029, Sec. 3.2. Departure: without the low-rank
    term, which is a layer and not a mask.

    >>> Butterfly(block=1)(jnp.zeros((4, 4)), 8).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    block: int  # sides of a block

    @property
    def sides(self) -> tuple[int, int]:
        """Give the sides of what is live or dead as a whole."""
        return (self.block, self.block)

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give the weights of one block a row of the shorter side, stretched.

        Raises:
            ValueError: if the shape is no matrix of such blocks.
        """
        sides = [n // self.block if self.block > 0 else 0 for n in shape]
        fits = len(shape) == 2 and all(n % max(self.block, 1) == 0 for n in shape)
        short, long = min(sides, default=0), max(sides, default=0)
        if not fits or short < 1 or short & (short - 1) or long % short:
            raise ValueError(
                f"butterfly(block={self.block}) needs a matrix of blocks, a power of"
                " two along one side and a multiple of it along the other, got shape"
                f" {shape}; choose another block, or exclude it"
            )
        return math.prod(shape) // short

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the first ``keep / quantum`` diagonals."""
        diagonals = keep // self.quantum(scores.shape)
        sides = [n // self.block for n in scores.shape]
        short = min(sides)
        first = sorted(range(short), key=lambda x: (x & (x - 1) != 0, x))
        rank = np.argsort(first)
        index = [np.arange(n) * short // n for n in sides]
        blocks = rank[index[0][:, None] ^ index[1]] < diagonals
        wide = jnp.repeat(jnp.asarray(blocks), self.block, axis=0)
        return jnp.repeat(wide, self.block, axis=1)


def _patterns(m: int) -> np.ndarray:
    """Give all m by m patterns with equal sums of rows and columns, best ties first."""
    rows = np.array(list(itertools.product((True, False), repeat=m)))
    found = []
    for each in range(m + 1):
        legal = rows[rows.sum(1) == each]
        for chosen in itertools.product(legal, repeat=m):
            pattern = np.stack(chosen)
            if (pattern.sum(0) == each).all():
                found.append(pattern)
    return np.stack(found)
