"""Estimators: the same value, each its own gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from sparsejax.masked import ESTIMATORS, Now
from sparsejax.masked.candidates import Learning, first_logits, learn, learned, mixture
from sparsejax.masked.criteria import Evidence
from sparsejax.masked.estimators import scale_of
from sparsejax.masked.structures import NOfM, Unstructured
from sparsejax.masked.updaters import Rule

ARGUMENTS = {"top_kast": {"backward": 0.75}}
MASK = jnp.array([[True, False, True], [False, True, False]])


SELECTING = {"masked", "straight_through", "sr_ste"}


def built(name):
    return partial(ESTIMATORS[name], **ARGUMENTS.get(name, {}))


@pytest.fixture
def weight(key):
    return jax.random.normal(key, (2, 3))


@pytest.fixture
def slope(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (2, 3))


def gradient(name, weight, slope, **arguments):
    _, back = jax.vjp(lambda w: ESTIMATORS[name](w, MASK, **arguments), weight)
    return np.asarray(back(slope)[0])


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_value_is_the_weight_where_live_and_zero_elsewhere(name, dtype, weight):
    weight = weight.astype(dtype).at[0, 1].set(100.0)  # what is dead is large
    value = jax.jit(built(name))(weight, MASK)
    assert value.dtype == weight.dtype
    live = MASK if name != "soft_threshold" else jnp.zeros_like(MASK)
    np.testing.assert_array_equal(value, np.where(live, weight, 0))


@pytest.mark.parametrize("name", sorted(SELECTING))
def test_what_is_dead_may_be_anything(name, weight):
    weight = weight.at[0, 1].set(jnp.nan)
    np.testing.assert_array_equal(built(name)(weight, MASK), np.where(MASK, weight, 0))


def test_masked_gives_the_gradient_to_live_weights(weight, slope):
    np.testing.assert_array_equal(
        gradient("masked", weight, slope), np.where(MASK, slope, 0)
    )
    value = lambda w: ESTIMATORS["masked"](jnp.asarray(w), MASK)  # noqa: E731
    check_grads(value, (weight,), order=1)


def test_straight_through_gives_the_whole_gradient(weight, slope):
    np.testing.assert_array_equal(gradient("straight_through", weight, slope), slope)


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.5])
def test_sr_ste_adds_decay_of_what_is_masked(decay, weight, slope):
    expected = slope + decay * np.where(MASK, 0, weight)
    np.testing.assert_allclose(
        gradient("sr_ste", weight, slope, decay=decay), expected, rtol=1e-6
    )


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_map_over_layers(name, weight):
    stack = jnp.stack([weight, 2 * weight])
    loss = lambda w, m: jnp.sum(built(name)(w, m) ** 2)  # noqa: E731
    each = jax.vmap(jax.grad(loss))(stack, jnp.stack([MASK, ~MASK]))
    for w, m, g in zip(stack, (MASK, ~MASK), each, strict=True):
        np.testing.assert_allclose(g, jax.grad(loss)(w, m), rtol=1e-6)


@pytest.mark.parametrize("name", ["mask_decay", "exponential_mask_decay"])
def test_a_mask_that_decays_begins_dense_and_ends_exact(name, weight, slope):
    at = {s: Now(step=s, begin=10, end=30) for s in (0, 10, 20, 30)}
    estimate = ESTIMATORS[name]
    for step in (0, 10):
        np.testing.assert_array_equal(estimate(weight, MASK, at[step]), weight)
    ended = estimate(weight, MASK, at[30])
    np.testing.assert_array_equal(ended, np.where(MASK, weight, 0))
    _, back = jax.vjp(lambda w: estimate(w, MASK, at[20]), weight)
    np.testing.assert_array_equal(back(slope)[0], slope)


def test_mask_decay_is_linear_and_its_other_form_exponential(weight):
    now = Now(step=15, begin=10, end=30)
    expected = np.where(MASK, weight, 0.75 * weight)
    value = ESTIMATORS["mask_decay"](weight, MASK, now)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    value = ESTIMATORS["exponential_mask_decay"](weight, MASK, now, rate=0.1)
    expected = np.where(MASK, weight, np.exp(-0.5) * weight)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_soft_thresholds_shrink_by_the_largest_that_is_dropped():
    weight = jnp.array([[4.0, -3.0, 2.0, 1.0, -8.0, 0.0, 1.0, 2.0]]).T
    mask = NOfM(m=4)(jnp.abs(weight), 4)
    now = Now(structure=NOfM(m=4))
    value = ESTIMATORS["soft_threshold"](weight, mask, now)
    expected = [2.0, -1.0, 0.0, 0.0, -7.0, 0.0, 0.0, 1.0]
    np.testing.assert_array_equal(value[:, 0], expected)


def test_soft_thresholds_do_not_jump_where_the_mask_flips():
    """Two weights that change places: the value moves as little as they do."""
    values = []
    for step in (-1e-3, 1e-3):
        weight = jnp.array([[3.0, 2.0 + step, 2.0, 1.0]])
        mask = NOfM(m=4, axis=1)(weight, 2)
        now = Now(structure=NOfM(m=4, axis=1))
        values.append(ESTIMATORS["soft_threshold"](weight, mask, now))
    assert np.abs(values[0] - values[1]).max() <= 2.1e-3


def test_the_scale_of_soft_thresholds_is_the_least_squares_one(weight):
    scale = float(scale_of(weight, MASK, Unstructured()))
    shrunk = np.asarray(ESTIMATORS["soft_threshold"](weight, MASK))
    tried = [
        np.sum((np.asarray(weight) - c * scale * shrunk) ** 2) for c in (0.9, 1, 1.1)
    ]
    assert tried[1] < min(tried[0], tried[2])
    scaled = ESTIMATORS["soft_threshold"](weight, MASK, Now(scale=jnp.float32(scale)))
    np.testing.assert_allclose(scaled, scale * shrunk, rtol=1e-6)


def test_top_kast_trains_the_largest_beside_the_live(slope):
    weight = jnp.array([[5.0, 4.0, 3.0], [0.5, -2.0, 1.0]])
    mask = Unstructured()(jnp.abs(weight), 2)
    _, back = jax.vjp(
        lambda w: ESTIMATORS["top_kast"](w, mask, backward=4 / 6, decay=0.5), weight
    )
    trained = np.array([[1, 1, 1], [0, 1, 0]], bool)
    # twice as sparse as dense is three times as much decay
    pull = 0.5 * np.asarray(weight) * np.where(mask, 1, 3)
    expected = np.where(trained, slope + pull, 0)
    np.testing.assert_allclose(back(slope)[0], expected, rtol=1e-6)


GROUPS = NOfM(m=4)
DRAWN = {"begin": 0, "end": 100, "keep": 8, "structure": GROUPS}


@pytest.mark.parametrize("step", [0, 50, 100])
def test_mixtures_keep_n_of_every_group_and_become_one_candidate(step, key):
    logits = jax.random.normal(key, (4, 6)) * 0.014
    now = Now(step=step, key=key, **DRAWN)
    soft = np.asarray(mixture(logits, now, (8, 2)))
    sums = soft.reshape(2, 4, 2).sum(1)
    np.testing.assert_allclose(sums, 2, rtol=1e-5)
    sharp = np.abs(soft - soft.round()).max()
    assert sharp < 0.05 if step == 100 else sharp > 0


def test_a_strong_prior_is_the_initial_mask(key):
    mask = GROUPS(jax.random.uniform(key, (8, 2)), 8)
    logits = first_logits(mask, key, GROUPS, 8, prior=100.0)
    seen = Evidence(mask.astype(jnp.float32), None, key, logits=logits)
    rule = Rule(GROUPS, abs, 8, final=8)
    np.testing.assert_array_equal(learned(mask, seen, rule), mask)


def test_logits_follow_the_loss_of_the_mixture(key):
    weight, target = jnp.ones((8, 2)), jnp.zeros((8, 2)).at[::2].set(1.0)
    now = Now(step=50, key=key, **DRAWN)
    logits = first_logits(target > 2, key, GROUPS, 8, 0.0)
    loss = lambda x: jnp.sum((weight * mixture(x, now, (8, 2)) - target) ** 2)  # noqa: E731
    used = ESTIMATORS["gumbel"](weight, target > 0, now._replace(logits=logits))
    layers = {"w": (lambda x: mixture(x, now, (8, 2)), weight, 2 * (used - target))}
    state = {"w": logits}, optax.adam(0.1).init({"w": logits})
    with jax.numpy_dtype_promotion("standard"):
        moved, _ = learn(Learning(rate=1e-3, reward=0.0), layers, state)
    slope = jax.grad(loss)(logits)
    # the first step of Adam is the sign of the gradient
    np.testing.assert_allclose(moved["w"] - logits, -1e-3 * np.sign(slope), atol=2e-4)


def test_too_many_candidates_are_refused(key):
    with pytest.raises(ValueError, match="8 of 16: 12870 candidates, at most 70"):
        first_logits(jnp.ones((16, 1), bool), key, NOfM(m=16), 8, 1.0)
