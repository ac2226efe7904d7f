"""Which rows a finetuning step may move: TF-IDF against its definition, and edges."""

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from sparsejax.memory.specific import most_specific, rarity, read_counts
from sparsejax.memory.table import Reads

LAYERS, SLOTS, TOKENS, K = 2, 9, 12, 3
TOTAL = LAYERS * SLOTS


def reads_of(seed):
    """Random reads, some of nothing, some by tokens without a gradient."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TOTAL + 1, (TOKENS, K)).astype(np.int32)
    vectors = rng.normal(size=(TOKENS, 4)).astype(np.float32)
    vectors[rng.random(TOKENS) < 0.2] = 0
    weights = np.ones((TOKENS, K), np.float32)
    weights[rng.random(TOKENS) < 0.2] = 0
    return Reads(jnp.asarray(ids), jnp.asarray(weights), jnp.asarray(vectors))


def chosen_by_definition(reads, seen, batches, top):
    """Score, sort and take, row by row."""
    counts = np.zeros(TOTAL)
    for ids, weights, vector in zip(*map(np.asarray, reads), strict=True):
        for row in ids[ids < TOTAL]:
            counts[row] += weights.any() and vector.any()
    idf = np.log((batches + 1) / (seen.reshape(-1) + 1))
    score = counts / max(counts.sum(), 1) * idf
    kept = set()
    for layer in range(LAYERS):
        rows = [r for r in range(layer * SLOTS, (layer + 1) * SLOTS) if counts[r]]
        rows.sort(key=lambda r: (-np.float32(score[r]), r))
        kept |= set(rows[:top])
    return counts, kept


@hypothesis.given(st.integers(0, 10**6), st.integers(1, SLOTS))
def test_rows_are_chosen_as_the_definition_says(seed, top):
    reads = reads_of(seed)
    seen = np.random.default_rng(seed + 1).integers(0, 6, (LAYERS, SLOTS))
    counts, kept = chosen_by_definition(reads, seen, 5, top)
    np.testing.assert_array_equal(
        read_counts(reads, layers=LAYERS, slots=SLOTS).reshape(-1), counts
    )
    rare = rarity(jnp.asarray(seen, jnp.int32), 5)
    found = most_specific(reads, rare, top=top)
    assert set(np.asarray(found.ids).reshape(-1).tolist()) - {TOTAL} == kept


def test_what_all_text_reads_comes_last_and_ties_go_to_the_lower_row():
    reads = Reads(
        jnp.array([[0, 1, 2], [0, 1, 2]], jnp.int32), jnp.ones((2, 3)), jnp.ones((2, 4))
    )
    seen = jnp.zeros((1, 4), jnp.int32).at[0, 0].set(7)
    rare = rarity(seen, 7)
    assert rare[0, 0] == 0
    first = most_specific(reads, rare, top=1).ids
    np.testing.assert_array_equal(first, [[4, 1, 4]] * 2)
    two = most_specific(reads, rare, top=2).ids
    np.testing.assert_array_equal(two, [[4, 1, 2]] * 2)
    every = most_specific(reads, rare, top=10**6).ids
    np.testing.assert_array_equal(every, reads.ids)
