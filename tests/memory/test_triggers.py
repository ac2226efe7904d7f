import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.memory.triggers import agrees, composed, merged, no_triggers, rank

KEYS, TOKENS, TOP = 5, 12, 3


def streamed(coefficients, valid, cut, top=TOP):
    found = no_triggers(coefficients.shape[1], top=top)
    parts = (slice(0, cut), slice(cut, None))
    for part in parts:
        if len(valid[part]):
            rows, live = jnp.asarray(coefficients[part]), jnp.asarray(valid[part])
            found = merged(found, rows, live, start=part.start)
    return found


def sorted_once(coefficients, valid, top):
    """The slow twin: every key's places, by coefficient, the earlier first."""
    found = []
    for key in range(coefficients.shape[1]):
        live = [n for n in range(len(valid)) if valid[n] and coefficients[n, key] > 0]
        live.sort(key=lambda n: (-coefficients[n, key], n))
        found.append([*live[:top], *[-1] * (top - len(live))])
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([4, 8]), st.booleans())
def test_streaming_a_text_finds_what_sorting_all_of_it_does(seed, cut, few):
    rng = np.random.default_rng(seed)
    # Few distinct values: ties everywhere.
    coefficients = rng.integers(-2, 3, (TOKENS, KEYS)).astype(np.float32)
    valid = rng.random(TOKENS) < (0.1 if few else 0.8)
    found = streamed(coefficients, valid, cut)
    assert found.places.tolist() == sorted_once(coefficients, valid, TOP)
    rows = np.asarray(found.places)
    kept = np.where(rows >= 0, coefficients[rows, np.arange(KEYS)[:, None]], 0)
    np.testing.assert_array_equal(found.coefficients, kept)


def test_more_triggers_than_text_leave_places_empty():
    found = streamed(np.ones((2, 1), np.float32), np.ones(2, bool), cut=2)
    assert found.places.tolist() == [[0, 1, -1]]


def test_planted_memories_say_what_follows_their_trigger():
    """A key is a token's probe, its value the embedding of the next: all agree."""
    rng = np.random.default_rng(0)
    vocabulary, width = 8, 64
    embedding = np.linalg.qr(rng.normal(size=(width, vocabulary)))[0].T
    text = np.array([3, 5, 1, 7, 2, 3, 5])
    keys = [3, 1, 2]  # followed by 5, 7, 3
    stream = embedding[text]
    coefficients = jax.nn.relu(stream @ embedding[keys].T)
    valid = np.arange(len(text)) < len(text) - 1
    found = streamed(coefficients, valid, cut=4)
    following = jnp.roll(jnp.array(text), -1)
    scores = jnp.array(embedding[[5, 7, 4]] @ embedding.T)  # the third is wrong
    right, asked = agrees(scores.argmax(-1), found, following)
    assert right.tolist() == [True, True, False]
    assert asked.all()
    assert rank(scores, found, following).tolist()[:2] == [0, 0]
    assert rank(scores, found, following)[2] > 0


def test_a_key_that_never_fires_is_not_asked():
    found = streamed(-np.ones((2, 1), np.float32), np.ones(2, bool), cut=2)
    right, asked = agrees(jnp.array([0]), found, jnp.array([0, 0]))
    assert not right.any()
    assert not asked.any()
    assert rank(jnp.ones((1, 4)), found, jnp.array([0, 0])).tolist() == [-1]


def test_a_layer_is_composed_where_no_active_memory_says_what_it_says():
    said = jnp.array([4, 6])
    coefficients = jnp.array([[1.0, -1.0], [1.0, -1.0], [0.0, 2.0]])
    assert composed(jnp.array([4, 6, 6]), said, coefficients).tolist() == [
        False,
        True,
        False,
    ]


def test_no_triggers_are_refused():
    with pytest.raises(ValueError, match=r"top=0: .* 1 trigger or more"):
        no_triggers(3, top=0)
