"""Estimators: the same value, each its own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sparsejax.masked import ESTIMATORS

MASK = jnp.array([[True, False, True], [False, True, False]])


@pytest.fixture
def weight(key):
    return jax.random.normal(key, (2, 3))


@pytest.fixture
def slope(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (2, 3))


def gradient(name, weight, slope, *rest):
    _, back = jax.vjp(lambda w: ESTIMATORS[name](w, MASK, *rest), weight)
    return np.asarray(back(slope)[0])


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_value_is_the_weight_where_live_and_zero_elsewhere(name, dtype, weight):
    weight = weight.astype(dtype).at[0, 1].set(jnp.nan)  # poison what is dead
    value = jax.jit(ESTIMATORS[name])(weight, MASK)
    assert value.dtype == weight.dtype
    np.testing.assert_array_equal(value, np.where(MASK, weight, 0))


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
        gradient("sr_ste", weight, slope, decay), expected, rtol=1e-6
    )


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_map_over_layers(name, weight):
    stack = jnp.stack([weight, 2 * weight])
    loss = lambda w, m: jnp.sum(ESTIMATORS[name](w, m) ** 2)  # noqa: E731
    each = jax.vmap(jax.grad(loss))(stack, jnp.stack([MASK, ~MASK]))
    for w, m, g in zip(stack, (MASK, ~MASK), each, strict=True):
        np.testing.assert_allclose(g, jax.grad(loss)(w, m), rtol=1e-6)
