"""Structures: exact counts, ties to the lower index, nothing else moves."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import STRUCTURES, structures
from sparsejax.masked.structures import best

SHAPE = (8, 12)
CASES = {
    "unstructured": {},
    "n_of_m": {"m": 4, "axis": 1},
    "block": {"tile": (2, 3)},
}
BUILT = {name: STRUCTURES[name](**CASES[name]) for name in CASES}


def slow_best(scores, keep):
    """Python's own stable sort, row by row."""
    mask = np.zeros(scores.shape, bool)
    for row, values in enumerate(scores):
        order = sorted(range(len(values)), key=lambda i: -values[i])
        mask[row, order[:keep]] = True
    return mask


def tied(seed, shape=SHAPE):
    """Few different values, so that ties are everywhere."""
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.float32)


def test_every_structure_has_a_case():
    assert set(CASES) == set(STRUCTURES)


@pytest.mark.parametrize("name", sorted(CASES))
@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_counts_are_exact_even_with_ties(name, seed, share):
    structure = BUILT[name]
    quantum = structure.quantum(SHAPE)
    keep = int(share * (96 // quantum)) * quantum
    mask = jax.jit(structure)(jnp.asarray(tied(seed)), keep)
    assert mask.dtype == bool
    assert int(mask.sum()) == keep


@given(seed=st.integers(0, 99), keep=st.integers(0, 12))
def test_best_equals_a_stable_sort(seed, keep):
    scores = tied(seed)
    np.testing.assert_array_equal(
        jax.jit(best)(jnp.asarray(scores), keep), slow_best(scores, keep)
    )


@pytest.mark.parametrize("name", sorted(CASES))
def test_nothing_and_everything_are_budgets(name):
    scores = jnp.asarray(tied(0))
    assert not BUILT[name](scores, 0).any()
    assert BUILT[name](scores, scores.size).all()


@pytest.mark.parametrize("name", sorted(CASES))
def test_ties_go_to_the_lower_index(name):
    structure, scores = BUILT[name], jnp.zeros(SHAPE)
    quantum = structure.quantum(SHAPE)
    mask = np.asarray(structure(scores, quantum))
    assert mask[0, 0]
    assert not mask[-1, -1]


def test_n_of_m_keeps_n_in_every_group_along_its_axis():
    mask = STRUCTURES["n_of_m"](m=4, axis=0)(jnp.asarray(tied(1)), 48)
    groups = np.asarray(mask).reshape(2, 4, 12)
    np.testing.assert_array_equal(groups.sum(axis=1), 2)
    scores = tied(1).reshape(2, 4, 12).transpose(0, 2, 1).reshape(-1, 4)
    expected = slow_best(scores, 2).reshape(2, 12, 4).transpose(0, 2, 1)
    np.testing.assert_array_equal(groups, expected)


def test_blocks_are_constant_inside_and_the_best_by_mean():
    scores = tied(2)
    mask = np.asarray(BUILT["block"](jnp.asarray(scores), 6 * 5))
    tiles = mask.reshape(4, 2, 4, 3)
    np.testing.assert_array_equal(tiles.all((1, 3)), tiles.any((1, 3)))
    means = scores.reshape(4, 2, 4, 3).mean((1, 3)).reshape(1, -1)
    np.testing.assert_array_equal(tiles.any((1, 3)).reshape(1, -1), slow_best(means, 5))


def test_block_tiles_the_last_axes():
    mask = STRUCTURES["block"](tile=(3,))(jnp.arange(24.0).reshape(2, 2, 6), 3)
    assert mask[1, 1, 3:].all()
    assert int(mask.sum()) == 3


@pytest.mark.parametrize("name", sorted(CASES))
def test_infinite_and_missing_scores_keep_the_count(name):
    scores = jnp.asarray(tied(3)).at[0].set(jnp.nan).at[1].set(jnp.inf)
    keep = 2 * BUILT[name].quantum(SHAPE)
    assert int(BUILT[name](scores, keep).sum()) == keep


def test_missing_scores_are_the_worst():
    scores = jnp.array([jnp.nan, -jnp.inf, 1.0])
    assert BUILT["unstructured"](scores, 1).tolist() == [False, False, True]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_an_empty_layer_has_an_empty_mask(shape):
    assert BUILT["unstructured"](jnp.zeros(shape), 0).shape == shape


def test_one_row_is_a_layer():
    assert BUILT["unstructured"](jnp.ones((1, 5)), 2).tolist() == [[1, 1, 0, 0, 0]]


def test_structures_map_over_layers():
    scores = jnp.asarray(tied(4, (3, 8, 12)))
    for structure in BUILT.values():
        keep = 2 * structure.quantum(SHAPE)
        each = jax.vmap(lambda x: structure(x, keep))(scores)  # noqa: B023
        np.testing.assert_array_equal(each.sum((1, 2)), keep)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("n_of_m", {"m": 5}),
        ("n_of_m", {"m": 4, "axis": 2}),
        ("n_of_m", {"m": 0}),
        ("block", {"tile": (3, 3)}),
        ("block", {"tile": (1, 2, 2)}),
        ("block", {"tile": ()}),
    ],
)
def test_a_structure_that_does_not_fit_says_so(name, arguments):
    with pytest.raises(ValueError, match=r"got shape|must divide the last axes"):
        STRUCTURES[name](**arguments).quantum(SHAPE)


def test_examples_in_the_docstrings_hold():
    result = doctest.testmod(structures, extraglobs={"jnp": jnp})
    assert result.attempted == 3
    assert not result.failed
