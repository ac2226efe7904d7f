"""Patterns of sequences that are frames of a video, one after another."""

from dataclasses import dataclass
from typing import Any

from sparsejax.attention.patterns import (
    FAR,
    Cover,
    Pattern,
    Span,
    at_least,
    everywhere,
    first,
    offsets,
)

__all__ = ["diagonal", "multi_diagonal", "vertical_stripe"]


@dataclass(frozen=True)
class _Phases(Pattern):
    """``i mod period`` and ``j mod period`` differ by less than ``width``."""

    period: int
    width: int

    def __call__(self, i: Any, j: Any) -> Any:
        return abs(i % self.period - j % self.period) < self.width

    def cover(self, rows: Span, columns: Span) -> Cover:
        # A block that crosses a period has two pieces of phases: left in between.
        top, left = rows.first % self.period, columns.first % self.period
        bottom, right = (
            top + rows.last - rows.first,
            left + columns.last - columns.first,
        )
        whole = (bottom < self.period) & (right < self.period)
        low, high = top - right, bottom - left
        some = (low < self.width) & (high > -self.width)
        every = (low > -self.width) & (high < self.width)
        there = (rows.first <= rows.last) & (columns.first <= columns.last)
        return Cover(there & (some | ~whole), there & every & whole)

    def reads(self, rows: Span) -> list[Span]:
        return [everywhere(rows)]

    @property
    def least_offset(self) -> int:
        return -FAR


def diagonal(width: int) -> Pattern:
    """Every query reads the keys less than ``width`` away, on both sides.

    Source: Chen et al. 2025, arXiv:2506.03065, Sec. 3.2.
    """
    at_least(1, width=width)
    return offsets(1 - width, width - 1)


def multi_diagonal(period: int, width: int) -> Pattern:
    """Every query reads, in each frame of ``period`` positions, the keys around its own
    place in the frame, less than ``width`` away.

    Source: Chen et al. 2025, arXiv:2506.03065, Sec. 3.2.
    """
    at_least(1, period=period, width=width)
    return _Phases(period, width)


def vertical_stripe(start: int, width: int) -> Pattern:
    """Every query reads the keys ``start`` to ``start + width - 1``.

    Source: Chen et al. 2025, arXiv:2506.03065, Sec. 3.2.
    """
    at_least(0, start=start)
    at_least(1, width=width)
    return first(start + width) & ~first(start)
