"""Structures: scores and a count in, a mask with exactly that many weights out.

A structure is called as ``(scores, keep) -> mask`` on the weights of one layer and may
be traced and mapped. ``quantum(shape)`` is the least number of weights it can add or
remove; every ``keep`` is a multiple of it. Higher scores are kept, ties go to the lower
index (row-major, or along the group), NaN counts as the lowest score.

Those whose unit is the same everywhere give ``units(scores)``, one score a unit, for
one ranking over several layers. Those that keep equally many in groups of one size give
``grouped(x)`` and its inverse. Those that are not the same in the whole of a schedule
give ``at(step, ramp)``, what they are at a step; they themselves are what they end as.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from sparsejax.masked.schedules import Ramp
from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "Block",
    "CoarseToFine",
    "ConstantFanIn",
    "NOfM",
    "Slice",
    "Structure",
    "Unstructured",
    "column",
    "heads",
    "row",
]


@runtime_checkable
class Structure(Protocol):
    """What every member of ``STRUCTURES`` builds."""

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give the least number of weights by which masks of this shape differ."""
        ...

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the ``keep`` weights with the best scores."""
        ...


def best(
    scores: Float[Array, "*rows n"], keep: int | Int[Array, ""]
) -> Bool[Array, "*rows n"]:
    """Mark the ``keep`` largest scores along the last axis.

    One sort finds the threshold; what equals it is taken from the left until the count
    is met, so the count is exact whatever the ties.
    """
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    ranked = jnp.sort(scores, axis=-1, descending=True)
    index = jnp.clip(jnp.asarray(keep) - 1, 0, scores.shape[-1] - 1)
    threshold = jnp.take(ranked, index, axis=-1)[..., None]
    above, level = scores > threshold, scores == threshold
    room = keep - jnp.sum(above, axis=-1, keepdims=True)
    return above | (level & (jnp.cumsum(level, axis=-1) <= room))


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Keep the best weights, wherever they are.

    >>> Unstructured()(jnp.array([[3.0, 1.0], [3.0, 2.0]]), 2).tolist()
    [[True, False], [True, False]]
    """

    def quantum(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        """Give 1: any count is possible."""
        return 1

    def units(self, scores: Float[Array, "*shape"]) -> Float[Array, " units"]:
        """Give the score of every weight."""
        return scores.reshape(-1)

    def grouped(self, x: Array) -> Array:
        """Take the layer as one group."""
        return x.reshape(1, -1)

    def ungrouped(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Undo ``grouped``."""
        return groups.reshape(shape)

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the ``keep`` best weights."""
        return best(self.units(scores), keep).reshape(scores.shape)


@dataclass(frozen=True, kw_only=True)
class NOfM:
    """Keep equally many of each ``m`` weights that are neighbours along one axis.

    The axis is the one a matrix product sums over if hardware is to use the pattern:
    the first of a kernel that stands to the right of its input.

    >>> NOfM(m=4)(jnp.array([4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0]), 4).tolist()
    [True, True, False, False, False, False, True, True]
    """

    m: int  # weights in a group
    axis: int = 0  # counted without the stack axes

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give the number of groups: each gains a weight when the budget grows.

        Raises:
            ValueError: if ``m`` does not divide the axis.
        """
        fits = -len(shape) <= self.axis < len(shape) and self.m > 0
        if not fits or shape[self.axis] % self.m:
            raise ValueError(
                f"n_of_m(m={self.m}, axis={self.axis}) needs that axis to be divisible"
                f" by m, got shape {shape}; choose another axis or m, or exclude it"
            )
        return math.prod(shape) // self.m

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the ``keep / groups`` best weights of every group."""
        each = keep // max(self.quantum(scores.shape), 1)
        return self.ungrouped(best(self.grouped(scores), each), scores.shape)

    def grouped(self, x: Array) -> Array:
        """Give the weights of each group as a row."""
        return jnp.moveaxis(x, self.axis, -1).reshape(-1, self.m)

    def ungrouped(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Undo ``grouped``."""
        return _from_last(groups, self.axis, shape)


@dataclass(frozen=True, kw_only=True)
class CoarseToFine(NOfM):
    """Keep as many of groups that halve in equal frames of time: n of each m at last.

    Of four frames the first keeps 8n of 8m, the others 4n of 4m, 2n of 2m and n of m:
    masks are free at first where they lie, and their density is the same throughout.

    Source: Bambhaniya et al. 2024, arXiv:2402.04744, Sec. 4.2.

    >>> scores, ramp = jnp.array([1.0, 2.0, 3.0, 4.0]), Ramp(0.5, 0.5, 0, 8)
    >>> CoarseToFine(m=2, frames=2).at(3, ramp)(scores, 2).tolist()
    [False, False, True, True]
    >>> CoarseToFine(m=2, frames=2).at(4, ramp)(scores, 2).tolist()
    [False, True, False, True]
    """

    frames: int = 4  # equal parts of the schedule, from its begin to its end

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give the number of the last groups, which is one of all others too.

        Raises:
            ValueError: if the first groups do not divide the axis.
        """
        try:
            self._coarsest.quantum(shape)
        except ValueError as error:
            raise ValueError(
                f"coarse_to_fine(m={self.m}, frames={self.frames}) begins with groups"
                f" of {self._coarsest.m}: {error}, or take fewer frames"
            ) from error
        return super().quantum(shape)

    def at(self, step: int | Int[Array, ""], ramp: Ramp) -> Structure:
        """Give the structure of masks that are chosen at a step."""
        passed = jnp.asarray(step, jnp.int32) - ramp.begin
        frame = passed * self.frames // max(ramp.end - ramp.begin, 1)
        last = self.frames - 1
        frame = jnp.where(step >= ramp.end, last, jnp.clip(frame, 0, last))
        return _Framed(self, frame)

    @property
    def _coarsest(self) -> NOfM:
        return NOfM(m=self.m << (self.frames - 1), axis=self.axis)


@dataclass(frozen=True)
class _Framed:
    """``CoarseToFine`` in one of its frames, which may be traced."""

    whole: CoarseToFine
    frame: Int[Array, ""]  # counted from 0

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give what all frames have in common."""
        return self.whole.quantum(shape)

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the best of every group of this frame."""
        m, axis = self.whole.m, self.whole.axis
        each = [NOfM(m=m << n, axis=axis) for n in reversed(range(self.whole.frames))]
        return jax.lax.switch(self.frame, each, scores, keep)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Keep whole tiles over the last axes, those with the best mean score.

    With ``power=2`` and sizes as scores, tiles are ranked by their Frobenius norm.

    Source: Okanovic et al. 2025, arXiv:2507.03117, Sec. 3.

    >>> Block(tile=(1, 2))(jnp.array([[1.0, 1.0, 5.0, 0.0]]), 2).tolist()
    [[False, False, True, True]]
    """

    tile: tuple[int, ...]  # its sides along the last axes
    power: int = 1  # of the scores, their sign kept, before their mean is taken

    @property
    def sides(self) -> tuple[int, ...]:
        """Give the sides of what is live or dead as a whole."""
        return self.tile

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give the number of weights in a tile.

        Raises:
            ValueError: if the tile does not divide the last axes.
        """
        sides = shape[max(len(shape) - len(self.tile), 0) :]
        fits = len(sides) == len(self.tile) and min(self.tile, default=0) > 0
        if not fits or any(n % t for n, t in zip(sides, self.tile, strict=True)):
            raise ValueError(
                f"block(tile={self.tile}) must divide the last axes of shape {shape};"
                " choose another tile, or exclude it"
            )
        return math.prod(self.tile)

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the ``keep / tile`` best tiles."""
        tiles = keep // self.quantum(scores.shape)
        live = best(self.units(scores), tiles)
        cut = [x for pair in self._cut(scores.shape) for x in pair]
        counts = [n if i % 2 == 0 else 1 for i, n in enumerate(cut)]
        return jnp.broadcast_to(live.reshape(counts), cut).reshape(scores.shape)

    def units(self, scores: Float[Array, "*shape"]) -> Float[Array, " units"]:
        """Give the mean score of every tile."""
        cut = [x for pair in self._cut(scores.shape) for x in pair]
        inner = tuple(range(1, 2 * scores.ndim, 2))
        if self.power != 1:
            scores = jnp.sign(scores) * jnp.abs(scores) ** self.power
        return jnp.mean(scores.reshape(cut), axis=inner).reshape(-1)

    def _cut(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Give, for each axis, how many tiles there are and how long they are."""
        tile = (1,) * (len(shape) - len(self.tile)) + self.tile
        return [(n // t, t) for n, t in zip(shape, tile, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Keep whole slices across one axis, those with the best mean score.

    >>> Slice(axis=1)(jnp.array([[1.0, 9.0], [1.0, 0.0]]), 2).tolist()
    [[False, True], [False, True]]
    """

    axis: int  # counted without the stack axes

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give the number of weights in a slice.

        Raises:
            ValueError: if there is no such axis.
        """
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"axis={self.axis} is no axis of shape {shape}; choose another, or"
                " exclude the parameter"
            )
        return math.prod(shape) // max(shape[self.axis], 1)

    def units(self, scores: Float[Array, "*shape"]) -> Float[Array, " units"]:
        """Give the mean score of every slice."""
        first = jnp.moveaxis(scores, self.axis, 0)
        return jnp.mean(first.reshape(first.shape[0], -1), axis=1)

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the ``keep / slice`` best slices."""
        live = best(self.units(scores), keep // self.quantum(scores.shape))
        sides = [1] * scores.ndim
        sides[self.axis] = -1
        return jnp.broadcast_to(live.reshape(sides), scores.shape)


def row() -> Slice:
    """Keep whole inputs: slices across the first axis."""
    return Slice(axis=0)


def column() -> Slice:
    """Keep whole outputs, or channels: slices across the last axis."""
    return Slice(axis=-1)


def heads(*, axis: int) -> Slice:
    """Keep whole heads; a plan takes ``axis="hg"`` for whichever a parameter has."""
    return Slice(axis=axis)


@dataclass(frozen=True, kw_only=True)
class ConstantFanIn:
    """Keep equally many of the inputs of every output.

    Source: Lasby et al. 2023, arXiv:2305.02299, Sec. 3.

    >>> ConstantFanIn()(jnp.array([[1.0, 9.0], [2.0, 0.0]]), 2).tolist()
    [[False, True], [True, False]]
    """

    axis: int = 0  # that a matrix product sums over

    def quantum(self, shape: tuple[int, ...]) -> int:
        """Give the number of outputs: each gains an input when the budget grows."""
        return Slice(axis=self.axis).quantum(shape)

    def grouped(self, x: Array) -> Array:
        """Give the inputs of each output as a row."""
        return jnp.moveaxis(x, self.axis, -1).reshape(-1, x.shape[self.axis])

    def ungrouped(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Undo ``grouped``."""
        return _from_last(groups, self.axis, shape)

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the ``keep / outputs`` best inputs of every output."""
        each = keep // max(self.quantum(scores.shape), 1)
        return self.ungrouped(best(self.grouped(scores), each), scores.shape)


def _from_last(groups: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """Put rows back along the axis that they were taken along."""
    rest = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    return jnp.moveaxis(groups.reshape(*rest, shape[axis]), -1, axis)
