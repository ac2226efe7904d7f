"""Structures: scores and a count in, a mask with exactly that many weights out.

A structure is called as ``(scores, keep) -> mask`` on the weights of one layer and may
be traced and mapped. ``quantum(shape)`` is the least number of weights it can add or
remove; every ``keep`` is a multiple of it. Higher scores are kept, ties go to the lower
index (row-major, or along the group), NaN counts as the lowest score.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["Block", "NOfM", "Structure", "Unstructured"]


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

    def __call__(
        self, scores: Float[Array, "*shape"], keep: int | Int[Array, ""]
    ) -> Bool[Array, "*shape"]:
        """Mark the ``keep`` best weights."""
        return best(scores.reshape(-1), keep).reshape(scores.shape)


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
        last = jnp.moveaxis(scores, self.axis, -1)
        mask = best(last.reshape(-1, self.m), each).reshape(last.shape)
        return jnp.moveaxis(mask, -1, self.axis)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Keep whole tiles over the last axes, those with the best mean score.

    >>> Block(tile=(1, 2))(jnp.array([[1.0, 1.0, 5.0, 0.0]]), 2).tolist()
    [[False, False, True, True]]
    """

    tile: tuple[int, ...]  # its sides along the last axes

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
        lead = scores.ndim - len(self.tile)
        tile = (1,) * lead + self.tile
        cut = [x for n, t in zip(scores.shape, tile, strict=True) for x in (n // t, t)]
        inner = tuple(range(1, 2 * scores.ndim, 2))
        means = jnp.mean(scores.reshape(cut), axis=inner, keepdims=True)
        live = best(means.reshape(-1), tiles).reshape(means.shape)
        return jnp.broadcast_to(live, cut).reshape(scores.shape)
