"""Rotary embedding depends on differences of positions only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import rope


def positions(*values):
    return jnp.array([values], "int32")


def test_rope_equals_a_complex_rotation(key):
    x = jax.random.normal(key, (1, 3, 2, 8))
    where = positions(0, 5, 100)
    z = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    rate = 100.0 ** (-np.arange(4) / 4)
    z = z * np.exp(1j * np.asarray(where)[..., None, None] * rate)
    expected = np.concatenate([z.real, z.imag], -1)
    # 1e-5: angles up to 100 in float32
    np.testing.assert_allclose(rope(x, where, theta=100.0), expected, atol=1e-5)


def test_products_depend_on_the_difference_of_positions(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 16))

    @jax.jit
    def product(i, j):
        return (rope(q, i, theta=1e4) * rope(k, j, theta=1e4)).sum()

    near = product(positions(9), positions(4))
    # 1e-4: angles up to 100 in float32
    np.testing.assert_allclose(near, product(positions(105), positions(100)), atol=1e-4)


def test_position_zero_is_left_alone(key):
    x = jax.random.normal(key, (1, 1, 2, 8)).astype(jnp.bfloat16)
    rotated = rope(x, positions(0), theta=1e4)
    assert rotated.dtype == x.dtype
    np.testing.assert_array_equal(rotated, x)


def test_rope_refuses_odd_widths():
    with pytest.raises(ValueError, match="head width 7"):
        rope(jnp.zeros((1, 1, 1, 7)), positions(0), theta=1e4)
