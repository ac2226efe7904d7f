"""Patterns that papers state over blocks of positions.

``in_blocks(rule, size)`` lets any rule speak of runs of ``size`` positions. Such a
pattern costs what it admits if the mask's blocks lie inside its own: choose
``block_q`` and ``block_kv`` that divide ``size``.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention.patterns import (
    FAR,
    Cover,
    Pattern,
    Span,
    at_least,
    causal,
    everywhere,
    first,
    sliding_window,
)
from sparsejax.attention.video_patterns import diagonal

__all__ = ["bigbird", "in_blocks", "power_attention"]

_PRIME = 32749  # its square is an int32


@dataclass(frozen=True)
class _InBlocks(Pattern):
    """``rule`` holds between the runs of ``size`` in which ``i`` and ``j`` lie."""

    rule: Pattern
    size: int

    def __call__(self, i: Any, j: Any) -> Any:
        return self.rule(i // self.size, j // self.size)

    def cover(self, rows: Span, columns: Span) -> Cover:
        return self.rule.cover(self._runs(rows), self._runs(columns))

    def reads(self, rows: Span) -> list[Span]:
        # Clipped, because FAR runs are more positions than an integer counts.
        return [
            Span(
                np.maximum(span.first, 0) * self.size,
                np.clip(span.last, -1, FAR // self.size - 1) * self.size
                + (self.size - 1),
            )
            for span in self.rule.reads(self._runs(rows))
        ]

    @property
    def least_offset(self) -> int:
        return max(-FAR, (self.rule.least_offset - 1) * self.size + 1)

    def _runs(self, span: Span) -> Span:
        return Span(span.first // self.size, span.last // self.size)


@dataclass(frozen=True)
class _PowersOfTwo(Pattern):
    """``i - j`` is a power of two."""

    def __call__(self, i: Any, j: Any) -> Any:
        offset = i - j
        return (offset > 0) & ((offset & (offset - 1)) == 0)

    def cover(self, rows: Span, columns: Span) -> Cover:
        low, high = rows.first - columns.last, rows.last - columns.first
        ones = high
        for shift in (1, 2, 4, 8, 16):
            ones = ones | (ones >> shift)
        some = (high > 0) & (ones - (ones >> 1) >= low)
        return Cover(some, some & (low == high))

    def reads(self, rows: Span) -> list[Span]:
        most = int(np.max(rows.last, initial=0)).bit_length()
        return [Span(rows.first - 2**k, rows.last - 2**k) for k in range(most)]

    @property
    def least_offset(self) -> int:
        return 1


@dataclass(frozen=True)
class _Transposed(Pattern):
    """``rule`` with queries and keys exchanged."""

    rule: Pattern

    def __call__(self, i: Any, j: Any) -> Any:
        return self.rule(j, i)

    def cover(self, rows: Span, columns: Span) -> Cover:
        return self.rule.cover(columns, rows)

    def reads(self, rows: Span) -> list[Span]:
        span = everywhere(rows)
        read = self.rule.cover(span, rows).some
        return [Span(span.first, np.where(read, span.last, -1))]

    @property
    def least_offset(self) -> int:
        return -FAR


@dataclass(frozen=True)
class _Random(Pattern):
    """Each inner row reads ``picks`` columns that BigBird's other rules leave out.

    The candidates of a row are cut into ``picks`` equal parts and one of each is drawn
    by arithmetic on (seed, row), so that a kernel can draw the same without a table.
    """

    rows: int
    picks: int
    seed: int

    def __call__(self, i: Any, j: Any) -> Any:
        inner = (i > 0) & (i < self.rows - 1)
        found = j < -1
        for pick in range(self.picks):
            found = found | (inner & (j == self.column(i, pick)))
        return found

    def column(self, row: Any, pick: int) -> Any:
        """Give the column of an inner row's draw, or -1 if too few are left."""
        xp: Any = jnp if isinstance(row, jax.Array) else np
        left, right = xp.maximum(row - 1, 1), xp.minimum(row + 1, self.rows - 2)
        window = right - left + 1
        free = self.rows - 2 - window
        low = free * pick // self.picks
        size = free * (pick + 1) // self.picks - low
        column = 1 + low + _hash(row, pick, self.seed) % xp.maximum(size, 1)
        column = xp.where(column >= left, column + window, column)
        return xp.where(size > 0, column, -1)

    def cover(self, rows: Span, columns: Span) -> Cover:
        single = (rows.first == rows.last) & (columns.first == columns.last)
        hit = self(rows.first, columns.first)
        return Cover(hit | ~single, hit & single)

    def reads(self, rows: Span) -> list[Span]:
        single = rows.first == rows.last
        inner = (rows.last > 0) & (rows.first < self.rows - 1)
        spans = []
        for pick in range(self.picks):
            column = np.where(inner, self.column(rows.first, pick), -1)
            column = np.where(single, column, 0)
            spans.append(Span(column, np.where(single, column, FAR)))
        return spans

    @property
    def least_offset(self) -> int:
        return -FAR


def _hash(row: Any, pick: int, seed: int) -> Any:
    """Mix three small numbers to one below 2**30, alike in every integer width."""
    a = (row % _PRIME * 7919 + pick * 977 + seed % _PRIME * 31 + 17) % _PRIME
    a = (a * a + 5 * a + pick + 1) % _PRIME
    b = (a * 12653 + row % _PRIME + 3) % _PRIME
    b = (b * b + 11 * b + 7) % _PRIME
    return b * _PRIME + a


def in_blocks(rule: Pattern, size: int) -> Pattern:
    """Let ``rule`` speak of runs of ``size`` positions instead of positions."""
    at_least(1, size=size)
    return _InBlocks(rule, size)


def power_attention(block: int = 256, window: int = 5, sinks: int = 1) -> Pattern:
    """Blocks at distances 1, 2, 4, 8, … plus a window and sinks, all in blocks.

    After ``n`` layers a position has reached ``2**n`` blocks of its past.

    Source: Chen et al. 2025, arXiv:2503.03588, Sec. 3.
    """
    at_least(1, window=window)
    rule = _PowersOfTwo() | sliding_window(window) | first(sinks)
    return causal() & in_blocks(rule, block)


def bigbird(length: int, block: int = 64, random: int = 3, seed: int = 0) -> Pattern:
    """Window of three blocks, first and last block both ways, and random blocks.

    Args:
        length: positions of the sequence, which says where the last block is.
        random: random blocks a row; fewer where a short sequence has no more.
        seed: of the random blocks; give each head its own with a tuple of patterns.

    Source: Zaheer et al. 2020, arXiv:2007.14062, Sec. 2 (ITC). Departure: the random
    blocks of a row come one from each of ``random`` equal parts of the sequence.
    """
    at_least(1, length=length, block=block)
    at_least(0, random=random, seed=seed)
    blocks = -(-length // block)
    ends = first(1) | ~first(blocks - 1)
    rule = diagonal(2) | ends | _Transposed(ends) | _Random(blocks, random, seed)
    return in_blocks(rule, block)
