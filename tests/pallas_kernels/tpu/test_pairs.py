"""The list of pairs holds every live block once, rows together, empty rows too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.tpu.pairs import (
    BITS,
    EMPTY,
    FIRST,
    KIND,
    LAST,
    Rows,
    pair_list,
)

build = jax.jit(pair_list, static_argnums=1)


def rows_of(counts):
    width = 4
    entries = np.arange(len(counts) * width, dtype="int32")
    start = np.arange(len(counts), dtype="int32") * width
    return Rows(start, np.array(counts, "int32"), entries + 100, entries % 3 + 1)


def expected(rows):
    for row, (start, count) in enumerate(zip(rows.start, rows.count, strict=True)):
        for place in range(max(count, 1)):
            first, last = place == 0, place == max(count, 1) - 1
            kind = rows.kinds[start + place] if count else EMPTY
            other = rows.others[start + place] if count else None
            yield row, kind, first, last, other


@given(counts=st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_pairs_are_the_live_entries_in_order(counts):
    rows = rows_of(counts)
    pairs = build(rows, 20)
    wanted = list(expected(rows))
    assert pairs.total == len(wanted)
    before = None
    for word, other, (row, kind, first, last, live) in zip(
        np.asarray(pairs.words), np.asarray(pairs.others), wanted, strict=False
    ):
        assert word >> BITS == row
        assert (word & ((1 << BITS) - 1)) >> KIND == kind
        assert bool(word & FIRST) == first
        assert bool(word & LAST) == last
        # An empty row fetches nothing new.
        assert other == live or (live is None and before in (None, other))
        before = other


@pytest.mark.parametrize("capacity", [3, 5])
def test_a_list_that_is_too_short_is_cut_and_not_overrun(capacity):
    rows = rows_of([2, 3, 1])
    pairs = build(rows, capacity)
    assert pairs.total == capacity
    assert pairs.words.shape == (capacity + 1,)


def test_the_list_is_a_function_of_traced_counts():
    counts = jnp.array([0, 4, 0, 2, 0])
    rows = rows_of(np.zeros(5))._replace(count=counts.astype("int32"))
    assert build(rows, 20).total == 9
