"""Patterns: which positions may read which, as expressions over absolute positions.

A pattern is a hashable tree, called as ``pattern(i, j)`` with query positions ``i`` and
key positions ``j`` (numpy or JAX integers that broadcast against each other), closed
under ``&``, ``|`` and ``~``. Each also judges whole blocks from their borders alone, in
three values: surely nothing, surely everything, or in between. The judgement errs
towards "in between", which costs time and never changes a result. No dense mask is
ever built, so a mask over a million positions takes a second.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Cover",
    "Pattern",
    "Span",
    "block_diagonal",
    "causal",
    "dilated",
    "first",
    "fixed",
    "full",
    "offsets",
    "prefix",
    "sliding_window",
    "streaming_llm",
    "strided",
]

FAR = 2**62  # beyond every position
FAR32 = 2**31 - 1  # beyond every offset, and still an int32


class Span(NamedTuple):
    """Closed intervals of positions, one per block."""

    first: Any
    last: Any


class Cover(NamedTuple):
    """What is known of blocks: ``every`` implies ``some``."""

    some: Any  # False only if no pair of the block is visible
    every: Any  # True only if all pairs of the block are visible


class Pattern(ABC):
    """A rule ``(i, j) -> bool``; combine rules with ``&``, ``|`` and ``~``.

    >>> rule = causal() & ~sliding_window(2)
    >>> rule(np.array(5), np.array([3, 4, 5, 6]))
    array([ True, False, False, False])
    """

    @abstractmethod
    def __call__(self, i: Any, j: Any) -> Any:
        """Whether query position ``i`` reads key position ``j``."""

    @abstractmethod
    def cover(self, rows: Span, columns: Span) -> Cover:
        """Judge the blocks ``rows`` by ``columns`` from their borders."""

    @abstractmethod
    def reads(self, rows: Span) -> list[Span]:
        """Give column intervals that together hold all that ``rows`` may read."""

    @property
    @abstractmethod
    def least_offset(self) -> int:
        """Lower bound of ``i - j`` over the visible pairs."""

    @property
    def is_causal(self) -> bool:
        """Whether the form of the expression proves that no query reads its future."""
        return self.least_offset >= 0

    def __and__(self, other: "Pattern") -> "Pattern":
        return _And(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return _Or(self, other)

    def __invert__(self) -> "Pattern":
        return _Not(self)


@dataclass(frozen=True)
class _And(Pattern):
    a: Pattern
    b: Pattern

    def __call__(self, i: Any, j: Any) -> Any:
        return self.a(i, j) & self.b(i, j)

    def cover(self, rows: Span, columns: Span) -> Cover:
        a, b = self.a.cover(rows, columns), self.b.cover(rows, columns)
        return Cover(a.some & b.some, a.every & b.every)

    def reads(self, rows: Span) -> list[Span]:
        return [
            Span(np.maximum(a.first, b.first), np.minimum(a.last, b.last))
            for a in self.a.reads(rows)
            for b in self.b.reads(rows)
        ]

    @property
    def least_offset(self) -> int:
        return max(self.a.least_offset, self.b.least_offset)


@dataclass(frozen=True)
class _Or(Pattern):
    a: Pattern
    b: Pattern

    def __call__(self, i: Any, j: Any) -> Any:
        return self.a(i, j) | self.b(i, j)

    def cover(self, rows: Span, columns: Span) -> Cover:
        a, b = self.a.cover(rows, columns), self.b.cover(rows, columns)
        return Cover(a.some | b.some, a.every | b.every)

    def reads(self, rows: Span) -> list[Span]:
        return self.a.reads(rows) + self.b.reads(rows)

    @property
    def least_offset(self) -> int:
        return min(self.a.least_offset, self.b.least_offset)


@dataclass(frozen=True)
class _Not(Pattern):
    a: Pattern

    def __call__(self, i: Any, j: Any) -> Any:
        return self.a(i, j) ^ True  # ``~`` would read a Python bool as a number

    def cover(self, rows: Span, columns: Span) -> Cover:
        a = self.a.cover(rows, columns)
        return Cover(~a.every, ~a.some)

    def reads(self, rows: Span) -> list[Span]:
        return [everywhere(rows)]

    @property
    def least_offset(self) -> int:
        return -FAR


@dataclass(frozen=True)
class _Offsets(Pattern):
    """``least <= i - j <= most``; None is no bound."""

    least: int | None
    most: int | None

    def __call__(self, i: Any, j: Any) -> Any:
        offset = i - j
        above = offset >= (-FAR32 if self.least is None else self.least)
        return above if self.most is None else above & (offset <= self.most)

    def cover(self, rows: Span, columns: Span) -> Cover:
        low, high = rows.first - columns.last, rows.last - columns.first
        some = every = low <= high
        if self.least is not None:
            some, every = some & (high >= self.least), every & (low >= self.least)
        if self.most is not None:
            some, every = some & (low <= self.most), every & (high <= self.most)
        return Cover(some, every)

    def reads(self, rows: Span) -> list[Span]:
        span = everywhere(rows)
        lowest = span.first if self.most is None else rows.first - self.most
        highest = span.last if self.least is None else rows.last - self.least
        return [Span(lowest, highest)]

    @property
    def least_offset(self) -> int:
        return -FAR if self.least is None else self.least


@dataclass(frozen=True)
class _Strides(Pattern):
    """``i - j`` is a multiple of ``stride``."""

    stride: int

    def __call__(self, i: Any, j: Any) -> Any:
        return (i - j) % self.stride == 0

    def cover(self, rows: Span, columns: Span) -> Cover:
        low, high = rows.first - columns.last, rows.last - columns.first
        some = high // self.stride * self.stride >= low
        return Cover(some, some & ((low == high) | (self.stride == 1)))

    def reads(self, rows: Span) -> list[Span]:
        return [everywhere(rows)]

    @property
    def least_offset(self) -> int:
        return -FAR


@dataclass(frozen=True)
class _First(Pattern):
    """``j < length``."""

    length: int

    def __call__(self, i: Any, j: Any) -> Any:
        return (j < self.length) & (i >= 0)

    def cover(self, rows: Span, columns: Span) -> Cover:
        there = rows.first <= rows.last
        some = there & (columns.first < self.length)
        return Cover(some, some & (columns.last < self.length))

    def reads(self, rows: Span) -> list[Span]:
        span = everywhere(rows)
        return [Span(span.first, np.minimum(span.last, self.length - 1))]

    @property
    def least_offset(self) -> int:
        return -FAR


@dataclass(frozen=True)
class _Tails(Pattern):
    """``j`` is one of the last ``width`` positions of its run of ``stride``."""

    stride: int
    width: int

    def __call__(self, i: Any, j: Any) -> Any:
        return (j % self.stride >= self.stride - self.width) & (i >= 0)

    def cover(self, rows: Span, columns: Span) -> Cover:
        start = columns.first - columns.first % self.stride
        tail = start + self.stride - self.width
        some = (rows.first <= rows.last) & (columns.last >= tail)
        inside = (columns.first >= tail) & (columns.last < start + self.stride)
        return Cover(some, some & (inside | (self.width == self.stride)))

    def reads(self, rows: Span) -> list[Span]:
        return [everywhere(rows)]

    @property
    def least_offset(self) -> int:
        return -FAR


@dataclass(frozen=True)
class _SameRun(Pattern):
    """``i`` and ``j`` lie in the same run of ``size`` positions."""

    size: int

    def __call__(self, i: Any, j: Any) -> Any:
        return i // self.size == j // self.size

    def cover(self, rows: Span, columns: Span) -> Cover:
        above, below = rows.first // self.size, rows.last // self.size
        left, right = columns.first // self.size, columns.last // self.size
        some = (above <= right) & (left <= below)
        return Cover(some, some & (above == below) & (left == right))

    def reads(self, rows: Span) -> list[Span]:
        lowest = rows.first // self.size * self.size
        return [Span(lowest, rows.last // self.size * self.size + self.size - 1)]

    @property
    def least_offset(self) -> int:
        return 1 - self.size


def everywhere(rows: Span) -> Span:
    """Give every column to every row."""
    return Span(np.zeros_like(rows.first), np.full_like(rows.last, FAR))


def at_least(least: int, **values: int) -> None:
    """Refuse arguments below ``least``, by name."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}: a pattern needs at least {least}")


def offsets(least: int | None, most: int | None) -> Pattern:
    """Every query reads the keys ``least`` to ``most`` behind it; None is no bound."""
    return _Offsets(least, most)


def full() -> Pattern:
    """Every query reads every key."""
    return offsets(None, None)


def causal() -> Pattern:
    """Every query reads itself and its past."""
    return offsets(0, None)


def first(length: int) -> Pattern:
    """Every query reads the first ``length`` keys."""
    at_least(0, length=length)
    return _First(length)


def sliding_window(window: int) -> Pattern:
    """Every query reads itself and the ``window - 1`` positions before it.

    Source: Beltagy et al. 2020, arXiv:2004.05150, Sec. 3.1. Departure: the past only.
    """
    at_least(1, window=window)
    return offsets(0, window - 1)


def dilated(window: int, dilation: int) -> Pattern:
    """Every query reads ``window`` positions of its past, ``dilation`` apart.

    Source: Beltagy et al. 2020, arXiv:2004.05150, Sec. 3.1. Departure: the past only.
    """
    at_least(1, window=window, dilation=dilation)
    return offsets(0, (window - 1) * dilation) & _Strides(dilation)


def streaming_llm(sinks: int, window: int) -> Pattern:
    """Attention sinks at the start of the sequence plus a sliding window.

    Of a row that packs several documents only the first has sinks, because a pattern
    counts positions in the row; ``learned_sinks`` gives every document one.

    Source: Xiao et al. 2023, arXiv:2309.17453, Sec. 3.2.
    """
    return causal() & (first(sinks) | sliding_window(window))


def strided(stride: int) -> Pattern:
    """The last ``stride`` positions, and every ``stride``-th one before them.

    Source: Child et al. 2019, arXiv:1904.10509, Sec. 4.3. Departure: both sets in one
    head; a tuple of patterns gives each its own heads.
    """
    at_least(1, stride=stride)
    return sliding_window(stride) | (causal() & _Strides(stride))


def fixed(stride: int, summary: int) -> Pattern:
    """The own run of ``stride`` positions, and the last ``summary`` of each before.

    Source: Child et al. 2019, arXiv:1904.10509, Sec. 4.3. Departure: both sets in one
    head; a tuple of patterns gives each its own heads.
    """
    at_least(1, stride=stride, summary=summary)
    if summary > stride:
        raise ValueError(f"summary={summary}: a run has only stride={stride} positions")
    return causal() & (_SameRun(stride) | _Tails(stride, summary))


def prefix(length: int) -> Pattern:
    """The first ``length`` positions are read by all, the rest causally.

    Source: Raffel et al. 2019, arXiv:1910.10683, Sec. 3.2.1.
    """
    return causal() | first(length)


def block_diagonal(size: int) -> Pattern:
    """Runs of ``size`` positions that read all of themselves and nothing else."""
    at_least(1, size=size)
    return _SameRun(size)
