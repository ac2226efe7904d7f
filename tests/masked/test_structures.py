"""Structures: exact counts, ties to the lower index, nothing else moves."""

import doctest
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import STRUCTURES, Ramp, structures, tiles
from sparsejax.masked.structures import best

SHAPE = (8, 12)
CASES = {
    "unstructured": {},
    "n_of_m": {"m": 4, "axis": 1},
    "coarse_to_fine": {"m": 2, "frames": 2, "axis": 1},
    "transposable": {"m": 4},
    "constant_fan_in": {"axis": 0},
    "block": {"tile": (2, 3)},
    "row": {},
    "column": {},
    "heads": {"axis": 1},
    "butterfly": {"block": 2},
}
# The shape is the same for all, but a butterfly's sides are powers of two.
SHAPES = dict.fromkeys(CASES, SHAPE) | {"butterfly": (8, 16)}
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
    shape = SHAPES[name]
    quantum = structure.quantum(shape)
    keep = int(share * (math.prod(shape) // quantum)) * quantum
    mask = jax.jit(structure)(jnp.asarray(tied(seed, shape)), keep)
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
    scores = jnp.asarray(tied(0, SHAPES[name]))
    structure = jax.jit(BUILT[name])
    assert not structure(scores, 0).any()
    assert structure(scores, scores.size).all()


# What is spread over the whole layer whatever its scores has a test of its own.
@pytest.mark.parametrize("name", sorted(set(CASES) - {"butterfly", "transposable"}))
def test_ties_go_to_the_lower_index(name):
    structure, scores = jax.jit(BUILT[name]), jnp.zeros(SHAPES[name])
    quantum = BUILT[name].quantum(scores.shape)
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


FRAMES = {-1: 0, 9: 0, 10: 0, 19: 0, 20: 1, 29: 1, 30: 2, 39: 2, 40: 3, 50: 3, 99: 3}


def test_coarse_to_fine_keeps_8n_of_8m_then_4n_of_4m_in_equal_frames():
    structure, ramp = STRUCTURES["coarse_to_fine"](m=4), Ramp(0.25, 0.25, 10, 50)
    scores = tied(11, (64, 3))
    at = jax.jit(lambda step: structure.at(step, ramp)(jnp.asarray(scores), 48))
    for step, frame in FRAMES.items():
        n = 8 >> frame
        groups = scores.T.reshape(-1, 4 * n)
        expected = slow_best(groups, n).reshape(3, 64).T
        np.testing.assert_array_equal(at(step), expected, err_msg=f"step {step}")


def test_a_schedule_of_one_change_goes_to_the_finest_groups_at_once():
    structure, ramp = STRUCTURES["coarse_to_fine"](m=2), Ramp(0.5, 0.5, 3, 3)
    scores = jnp.asarray(tied(12, (16, 3)))
    fine = STRUCTURES["n_of_m"](m=2)(scores, 24)
    np.testing.assert_array_equal(structure.at(3, ramp)(scores, 24), fine)
    coarse = STRUCTURES["n_of_m"](m=16)(scores, 24)
    np.testing.assert_array_equal(structure.at(2, ramp)(scores, 24), coarse)


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


def slow_transposable(tile, n):
    """Try all masks of a 4 by 4 tile, rows of n first."""
    rows = [r for r in itertools.product((1, 0), repeat=4) if sum(r) == n]
    legal = [
        np.array(x, bool)
        for x in itertools.product(rows, repeat=4)
        if (np.sum(x, axis=0) == n).all()
    ]
    return max(legal, key=lambda mask: tile[mask].sum())


def test_transposable_masks_are_the_best_that_keep_n_along_both_axes():
    scores = tied(5)
    mask = np.asarray(BUILT["transposable"](jnp.asarray(scores), 48))
    for i, j in itertools.product(range(2), range(3)):
        at = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
        np.testing.assert_array_equal(mask[at], slow_transposable(scores[at], 2))
        assert (mask[at].sum(0) == 2).all()
        assert (mask[at].sum(1) == 2).all()


def test_two_of_four_has_ninety_transposable_patterns():
    assert (tiles._patterns(4).sum((1, 2)) == 8).sum() == 90


def test_a_transposable_mask_avoids_what_is_not_eligible():
    first = BUILT["transposable"](jnp.asarray(tied(6)), 48)
    scores = jnp.where(first, -jnp.inf, jnp.asarray(tied(7)))
    second = BUILT["transposable"](scores, 48)
    np.testing.assert_array_equal(first, ~second)


def test_constant_fan_in_keeps_the_best_inputs_of_every_output():
    scores = tied(8)
    mask = BUILT["constant_fan_in"](jnp.asarray(scores), 36)
    np.testing.assert_array_equal(np.asarray(mask).T, slow_best(scores.T, 3))
    mask = STRUCTURES["constant_fan_in"](axis=1)(jnp.asarray(scores), 24)
    np.testing.assert_array_equal(mask, slow_best(scores, 3))


@pytest.mark.parametrize(("name", "axis"), [("row", 0), ("column", 1), ("heads", 1)])
def test_slices_are_whole_and_the_best_by_mean(name, axis):
    scores = tied(9)
    structure = BUILT[name]
    mask = structure(jnp.asarray(scores), 3 * structure.quantum(SHAPE))
    expected = slow_best(scores.mean(1 - axis).reshape(1, -1), 3)[0]
    whole = np.broadcast_to(np.expand_dims(expected, 1 - axis), SHAPE)
    np.testing.assert_array_equal(mask, whole)


def test_a_head_is_all_that_its_axis_has():
    scores = jnp.arange(24.0).reshape(2, 3, 4)
    mask = STRUCTURES["heads"](axis=1)(scores, 8)
    assert mask[:, 2].all()
    assert int(mask.sum()) == 8


@pytest.mark.parametrize("factors", [0, 1, 2, 3])
def test_a_butterfly_is_the_union_of_its_factors(factors):
    union = np.eye(8, dtype=bool)
    for f in range(factors):
        pair = np.ones((2, 2), bool)
        inner, outer = np.eye(2**f, dtype=bool), np.eye(8 // 2 ** (f + 1), dtype=bool)
        union |= np.kron(outer, np.kron(pair, inner))
    mask = STRUCTURES["butterfly"](block=2)(jnp.zeros((16, 16)), 32 * (factors + 1))
    np.testing.assert_array_equal(mask, np.kron(union, np.ones((2, 2), bool)))


def test_an_oblong_butterfly_is_stretched():
    square = STRUCTURES["butterfly"](block=2)(jnp.zeros((8, 8)), 32)
    wide = BUILT["butterfly"](jnp.zeros((8, 16)), 64)
    np.testing.assert_array_equal(wide, np.repeat(square, 2, axis=1))


def test_blocks_may_be_ranked_by_their_norm():
    scores = np.abs(tied(10)) + np.eye(8, 12, dtype=np.float32)
    mask = STRUCTURES["block"](tile=(2, 3), power=2)(jnp.asarray(scores), 6 * 5)
    norms = (scores.reshape(4, 2, 4, 3) ** 2).sum((1, 3)).reshape(1, -1)
    live = np.asarray(mask).reshape(4, 2, 4, 3).any((1, 3)).reshape(1, -1)
    np.testing.assert_array_equal(live, slow_best(norms, 5))


@pytest.mark.parametrize("name", sorted(CASES))
def test_infinite_and_missing_scores_keep_the_count(name):
    scores = jnp.asarray(tied(3, SHAPES[name])).at[0].set(jnp.nan).at[1].set(jnp.inf)
    keep = 2 * BUILT[name].quantum(scores.shape)
    assert int(jax.jit(BUILT[name])(scores, keep).sum()) == keep


def test_missing_scores_are_the_worst():
    scores = jnp.array([jnp.nan, -jnp.inf, 1.0])
    assert BUILT["unstructured"](scores, 1).tolist() == [False, False, True]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_an_empty_layer_has_an_empty_mask(shape):
    assert BUILT["unstructured"](jnp.zeros(shape), 0).shape == shape


def test_one_row_is_a_layer():
    assert BUILT["unstructured"](jnp.ones((1, 5)), 2).tolist() == [[1, 1, 0, 0, 0]]


@pytest.mark.parametrize("name", sorted(CASES))
def test_structures_map_over_layers(name):
    scores = jnp.asarray(tied(4, (3, *SHAPES[name])))
    keeps = BUILT[name].quantum(SHAPES[name]) * jnp.arange(3)
    each = jax.jit(jax.vmap(BUILT[name]))(scores, keeps)
    np.testing.assert_array_equal(each.sum((1, 2)), keeps)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("n_of_m", {"m": 5}),
        ("n_of_m", {"m": 4, "axis": 2}),
        ("n_of_m", {"m": 0}),
        ("coarse_to_fine", {"m": 4, "frames": 2, "axis": 1}),
        ("coarse_to_fine", {"m": 4, "axis": 1}),
        ("block", {"tile": (3, 3)}),
        ("block", {"tile": (1, 2, 2)}),
        ("block", {"tile": ()}),
        ("transposable", {"m": 3}),
        ("transposable", {"m": 8}),
        ("transposable", {"axes": (0, 0)}),
        ("transposable", {"axes": (0,)}),
        ("constant_fan_in", {"axis": 2}),
        ("heads", {"axis": -3}),
        ("butterfly", {"block": 3}),
        ("butterfly", {"block": 0}),
        ("butterfly", {"block": 4}),
    ],
)
def test_a_structure_that_does_not_fit_says_so(name, arguments):
    with pytest.raises(
        ValueError, match=r"got shape|must divide the last axes|no axis"
    ):
        STRUCTURES[name](**arguments).quantum(SHAPE)


@pytest.mark.parametrize(("module", "examples"), [(structures, 8), (tiles, 2)])
def test_examples_in_the_docstrings_hold(module, examples):
    result = doctest.testmod(module, extraglobs={"jnp": jnp})
    assert result.attempted == examples
    assert not result.failed
