"""Updaters: the count is what was asked, and each moves as its paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import CRITERIA, UPDATERS, Evidence, Rule
from sparsejax.masked.structures import Block, NOfM, Unstructured

SHAPE = (6, 8)
STRUCTURES = [Unstructured(), NOfM(m=4, axis=1), Block(tile=(2, 2))]
MOVING = sorted(set(UPDATERS) - {"static"})


def evidence(seed):
    """Ties in the weights and in the gradient."""
    draw = np.random.default_rng(seed)
    w, g = (draw.integers(-3, 4, SHAPE).astype(np.float32) for _ in range(2))
    return Evidence(jnp.asarray(w), jnp.asarray(g), jax.random.key(seed))


def start(structure, keep, seed=5):
    return structure(CRITERIA["random"](evidence(seed)), keep)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", MOVING)
@given(seed=st.integers(0, 50), counts=st.tuples(*[st.floats(0, 1)] * 3))
def test_the_next_mask_has_the_count_asked_for(name, structure, seed, counts):
    quantum = structure.quantum(SHAPE)
    before, keep = (int(x * (48 // quantum)) * quantum for x in counts[:2])
    moved = int(counts[2] * (keep // quantum)) * quantum
    rule = Rule(structure, CRITERIA["magnitude"], keep, moved)
    mask = UPDATERS[name](start(structure, before), evidence(seed), rule)
    assert int(mask.sum()) == keep


@pytest.mark.parametrize("name", MOVING)
def test_the_count_survives_gradients_that_are_not_numbers(name):
    seen = evidence(0)._replace(gradient=jnp.full(SHAPE, jnp.nan))
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 20, 6)
    assert int(UPDATERS[name](start(STRUCTURES[0], 20), seen, rule).sum()) == 20


def test_prune_keeps_the_largest_of_the_live():
    mask, seen = start(STRUCTURES[0], 30), evidence(1)
    after = UPDATERS["prune"](
        mask, seen, Rule(STRUCTURES[0], CRITERIA["magnitude"], 12)
    )
    assert not (after & ~mask).any()
    size = np.abs(np.asarray(seen.weight))
    assert size[after].min() >= size[mask & ~after].max()


def test_select_may_bring_back_what_was_dead():
    mask, seen = jnp.zeros(SHAPE, bool), evidence(1)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 12)
    after = UPDATERS["select"](mask, seen, rule)
    np.testing.assert_array_equal(after, STRUCTURES[0](jnp.abs(seen.weight), 12))


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest():
    mask = jnp.array([[True, True, True, False, False, False]])
    weight = jnp.array([[3.0, -1.0, 2.0, 0.0, 0.0, 0.0]])
    seen = Evidence(weight, jnp.array([[9.0, 1.0, 9.0, 2.0, -5.0, 3.0]]), None)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 3, 1)
    after = UPDATERS["rigl"](mask, seen, rule)
    assert after.tolist() == [[True, False, True, False, True, False]]


def test_rigl_may_grow_again_what_it_just_dropped():
    mask = jnp.array([[True, True, False]])
    seen = Evidence(jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[0.0, 4.0, 2.0]]), None)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 2, 1)
    assert UPDATERS["rigl"](mask, seen, rule).tolist() == mask.tolist()


def test_set_grows_everywhere_in_the_end():
    mask, seen = start(STRUCTURES[0], 12), evidence(2)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 12, 6)
    grow = jax.jit(lambda key: UPDATERS["set"](mask, seen._replace(key=key), rule))
    kept = UPDATERS["prune"](mask, seen, rule._replace(keep=6))
    visits = sum(np.asarray(grow(jax.random.key(i))) for i in range(100))
    assert (visits[kept] == 100).all()
    # 42 candidates for 6 places: 14 visits each on average, 3.5 the deviation
    assert visits[~kept].min() > 0
    assert visits[~kept].max() < 14 + 5 * 3.5


def test_static_changes_nothing():
    mask = start(STRUCTURES[0], 12)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 3)
    assert UPDATERS["static"](mask, evidence(0), rule) is mask


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_criteria_score_in_float32_and_are_a_function_of_the_evidence(name):
    seen = evidence(3)
    seen = seen._replace(weight=seen.weight.astype(jnp.bfloat16))
    scores = CRITERIA[name](seen)
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, CRITERIA[name](seen))


def test_saliency_is_the_product_and_gradient_its_size():
    seen = evidence(3)
    w, g = np.asarray(seen.weight), np.asarray(seen.gradient)
    np.testing.assert_array_equal(CRITERIA["saliency"](seen), np.abs(w * g))
    np.testing.assert_array_equal(CRITERIA["gradient"](seen), np.abs(g))
    np.testing.assert_array_equal(CRITERIA["magnitude"](seen), np.abs(w))


@pytest.mark.parametrize("name", ["gradient", "saliency"])
def test_a_criterion_says_when_it_has_no_gradient(name):
    with pytest.raises(ValueError, match="no gradient before the first step"):
        CRITERIA[name](evidence(0)._replace(gradient=None))
