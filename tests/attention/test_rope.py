"""Rotary embedding depends on differences of positions only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import AttentionConfig, rope
from sparsejax.attention.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
)
from sparsejax.config import FieldError


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


def turned_rates(scaling, half=8, theta=100.0):
    """Read the rates, in radians a position, off a rotation by one position."""
    pairs = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])[None, None, None]
    rotated = rope(pairs, positions(1), theta=theta, scaling=scaling)[0, 0, 0]
    return np.arctan2(rotated[half:], rotated[:half]), np.hypot(*np.split(rotated, 2))


PLAIN = 100.0 ** (-np.arange(8) / 8)


def test_linear_scaling_divides_positions():
    rates, amplitude = turned_rates(LinearScaling(factor=4.0))
    np.testing.assert_allclose(rates, PLAIN / 4, rtol=1e-5)
    np.testing.assert_allclose(amplitude, 1, rtol=1e-6)


def test_llama3_scaling_keeps_fast_rates_and_divides_slow_ones():
    scaling = Llama3Scaling(factor=8.0, low=1.0, high=4.0, trained=64)
    rates, _ = turned_rates(scaling)
    for rate, plain in zip(rates, PLAIN, strict=True):
        wavelength = 2 * np.pi / plain
        if wavelength < 64 / 4:
            expected = plain
        elif wavelength > 64:
            expected = plain / 8
        else:
            share = (64 / wavelength - 1) / 3
            expected = (1 - share) * plain / 8 + share * plain
        np.testing.assert_allclose(rate, expected, rtol=1e-5)
    kinds = rates / PLAIN
    assert kinds[0] == pytest.approx(1)
    assert kinds[-1] == pytest.approx(1 / 8)
    assert ((kinds > 0.13) & (kinds < 0.99)).any()  # and something between


def test_yarn_scaling_mixes_by_channel_and_amplifies():
    scaling = YarnScaling(factor=4.0, slow=1.0, fast=6.0, trained=64, truncate=False)
    rates, amplitude = turned_rates(scaling)
    at = lambda turns: 8 * np.log(64 / (turns * 2 * np.pi)) / np.log(100.0)  # noqa: E731
    share = np.clip((np.arange(8) - at(6.0)) / (at(1.0) - at(6.0)), 0, 1)
    np.testing.assert_allclose(rates, PLAIN * ((1 - share) + share / 4), rtol=1e-5)
    np.testing.assert_allclose(amplitude, 1 + 0.1 * np.log(4), rtol=1e-6)


def test_a_growth_of_all_channels_is_taken_from_the_rotated_ones():
    scaling = YarnScaling(factor=40.0, trained=64, mscale=0.7, mscale_all=1.0)
    grown = [1 + 0.1 * share * np.log(40) for share in (0.7, 1.0)]
    np.testing.assert_allclose(scaling.amplitude, grown[0] / grown[1], rtol=1e-6)
    np.testing.assert_allclose(scaling.logit_gain, grown[1] ** 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (LinearScaling, {"factor": 0.5}),
        (Llama3Scaling, {"factor": 8.0, "low": 4.0, "high": 4.0}),
        (Llama3Scaling, {"factor": 8.0, "low": 0.0}),
        (YarnScaling, {"factor": 8.0, "trained": 0}),
        (YarnScaling, {"factor": 8.0, "trained": 64, "slow": 0.0}),
        (YarnScaling, {"factor": 8.0, "trained": 64, "slow": -1.0}),
        (YarnScaling, {"factor": 8.0, "trained": 64, "gain": 0.0}),
        (YarnScaling, {"factor": 8.0, "trained": 64, "mscale": 1.0}),
        (YarnScaling, {"factor": 8.0, "trained": 64, "mscale": 1.0, "mscale_all": 0.0}),
    ],
)
def test_a_scaling_that_cannot_be_is_named(kind, given):
    with pytest.raises(FieldError, match=r"must be|below"):
        kind(**given)


def test_rates_that_do_not_fall_are_not_scaled():
    scaling = YarnScaling(factor=8.0, trained=64)
    with pytest.raises(FieldError, match=r"rope_theta=1\.0: must be above 1, or rope"):
        AttentionConfig(rope_theta=1.0, rope_scaling=scaling)
