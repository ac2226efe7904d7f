"""Weights by fan-in: products with few rows and with many, against the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masked import ConstantFanIn, FanIn
from sparsejax.masked import fan_in as module

WIDTH, OUTPUTS, EACH = 24, 12, 3
ROWS = {"few": 2, "many": module.FEW + 1}
rows_of = pytest.mark.parametrize("rows", sorted(ROWS))


def matrix(key):
    """Three inputs for every output but the last, which has none."""
    w = jax.random.normal(key, (WIDTH, OUTPUTS))
    mask = ConstantFanIn()(jnp.abs(w), EACH * OUTPUTS)
    return jnp.where(mask, w, 0).at[:, -1].set(0)


@jax.jit
def both_passes(x, w, dy):
    y, back = jax.vjp(lambda x, w: x @ w, x, w)
    return y, *back(dy)


@rows_of
def test_a_product_is_the_sum_over_the_inputs_of_each_output(key, rows):
    w = FanIn.from_dense(matrix(key))
    x = jax.random.normal(key, (ROWS[rows], WIDTH))
    values, inputs = np.asarray(w.values, "float64"), np.asarray(w.inputs)
    expected = np.zeros((len(x), OUTPUTS))
    for n, row in enumerate(np.asarray(x)):
        for f in range(OUTPUTS):
            for value, i in zip(values[:, f], inputs[:, f], strict=True):
                expected[n, f] += value * row[i]
    np.testing.assert_allclose(x @ w, expected, rtol=1e-5, atol=1e-6)


@rows_of
def test_gradients_are_those_of_the_live_weights(key, rows):
    dense = matrix(key)
    w = FanIn.from_dense(dense)
    x = jax.random.normal(key, (ROWS[rows], WIDTH))
    dy = jnp.cos(jnp.arange(x.shape[0] * OUTPUTS, dtype="float32")).reshape(-1, OUTPUTS)
    _, dx, dw = both_passes(x, dense, dy)

    def value(x, values):
        return jnp.sum((x @ FanIn(values, w.inputs, WIDTH)) * dy)

    ex, ev = jax.jit(jax.grad(value, (0, 1)))(x, w.values)
    at = w.inputs.astype("int32"), jnp.arange(OUTPUTS)[None]
    np.testing.assert_allclose(ex, dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ev, dw[at], rtol=1e-5, atol=1e-5)


def test_a_matrix_comes_back(key):
    dense = matrix(key)
    w = FanIn.from_dense(dense)
    assert (w.shape, w.values.shape) == (dense.shape, (EACH, OUTPUTS))
    assert w.inputs.dtype == "uint16"
    np.testing.assert_array_equal(w.to_dense(), dense)
    np.testing.assert_array_equal(FanIn.from_dense(dense, k=5).to_dense(), dense)


def test_more_inputs_than_sixteen_bits_count_are_counted_in_more(monkeypatch):
    monkeypatch.setattr(module, "SHORT", 2)
    w = jnp.zeros((3, 2)).at[2].set(1.0)
    assert FanIn.from_dense(w).inputs.dtype == "int32"


def test_an_empty_weight_gives_0():
    w = FanIn.from_dense(jnp.zeros((WIDTH, OUTPUTS)))
    np.testing.assert_array_equal(jnp.ones((2, WIDTH)) @ w, np.zeros((2, OUTPUTS)))


def test_inputs_that_no_output_has_are_not_read():
    w = FanIn.from_dense(jnp.zeros((4, 2)).at[1].set(2.0))
    x = jnp.array([[jnp.nan, 3.0, jnp.nan, jnp.nan]])
    np.testing.assert_array_equal(x @ w, [[6.0, 6.0]])
    np.testing.assert_array_equal(np.asarray(x) @ w, [[6.0, 6.0]])


def test_sums_of_short_floats_are_long(key):
    x = jax.random.normal(key, (1, WIDTH)).astype("bfloat16")
    dense = matrix(key).astype("bfloat16")
    w = FanIn.from_dense(dense).astype("bfloat16")
    y = x @ w[...]
    assert (y.dtype, w.dtype) == ("bfloat16", "bfloat16")
    wide = x.astype("float32") @ dense.astype("float32")
    np.testing.assert_array_equal(y, wide.astype("bfloat16"))


def test_faults_are_named(key):
    dense = matrix(key)
    with pytest.raises(ValueError, match="k=2: an output has 3 inputs; raise k"):
        FanIn.from_dense(dense, k=2)
    with pytest.raises(ValueError, match="k=None: inputs of a traced weight"):
        jax.jit(FanIn.from_dense)(dense)
    with pytest.raises(TypeError, match="only multiplies"):
        FanIn.from_dense(dense)[0]
