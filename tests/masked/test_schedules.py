"""Schedules: both ends exact, never rising, and each one's own curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import SCHEDULES, Ramp

RAMP = Ramp(initial=0.9, final=0.2, begin=10, end=50, every=4)
FALLING = sorted(set(SCHEDULES) - {"ac_dc"})
STEPS = jnp.arange(-1, 70)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_end_is_exact_and_lasts(name):
    density = np.asarray(SCHEDULES[name](STEPS, RAMP))
    np.testing.assert_array_equal(density[STEPS >= 50], np.float32(0.2))


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"constant"}))
def test_the_beginning_is_exact(name):
    density = np.asarray(SCHEDULES[name](STEPS, RAMP))
    np.testing.assert_array_equal(density[STEPS < 10], np.float32(0.9))


@pytest.mark.parametrize("name", FALLING)
@given(
    ends=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    begin=st.integers(0, 20),
    updates=st.integers(0, 10),
    every=st.integers(1, 5),
)
def test_density_never_rises_nor_leaves_its_ends(name, ends, begin, updates, every):
    ramp = Ramp(max(ends), min(ends), begin, begin + updates * every, every)
    density = np.asarray(SCHEDULES[name](STEPS, ramp))
    assert (np.diff(density) <= 0).all()
    # float32 powers are right to a few units in the last place
    assert density.min() >= min(ends) * (1 - 1e-6)
    assert density.max() <= max(ends) * (1 + 1e-6)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_traced_step_gives_the_same_density(name):
    schedule = SCHEDULES[name]
    for step in (-1, 10, 23, 50):
        traced = jax.jit(lambda x: schedule(x, RAMP))(step)
        # XLA may contract a multiply and an add into one rounding
        np.testing.assert_allclose(traced, schedule(step, RAMP), rtol=1e-6)


def test_cubic_has_its_mean_a_quarter_of_the_way_up():
    ramp = Ramp(1.0, 0.2, 0, 100_000)
    density = SCHEDULES["cubic"](jnp.arange(100_000), ramp)
    mean = np.asarray(density, np.float64).mean()
    # a Riemann sum: off by half a step of the whole fall
    assert mean == pytest.approx(0.2 + 0.8 / 4, abs=1e-5)


def test_cubic_follows_its_formula():
    step = np.arange(10, 51)
    expected = 0.2 + 0.7 * (1 - (step - 10) / 40) ** 3
    np.testing.assert_allclose(
        SCHEDULES["cubic"](jnp.asarray(step), RAMP), expected, rtol=1e-6
    )


def test_geometric_keeps_the_same_fraction_at_every_pruning():
    at = np.arange(10, 51, 4)
    density = np.asarray(SCHEDULES["geometric"](jnp.asarray(at), RAMP), np.float64)
    kept = density / np.concatenate([[0.9], density[:-1]])
    np.testing.assert_allclose(kept, (0.2 / 0.9) ** (1 / len(at)), rtol=1e-5)


def test_one_shot_jumps_at_begin():
    density = np.asarray(SCHEDULES["one_shot"](STEPS, RAMP))
    np.testing.assert_array_equal(density, np.where(STEPS < 10, 0.9, 0.2).astype("f"))


def test_constant_is_sparse_before_the_first_step():
    assert float(SCHEDULES["constant"](-1, RAMP)) == np.float32(0.2)


def test_ac_dc_alternates_and_ends_sparse():
    at = jnp.arange(10, 51, 4)
    dense = np.asarray(SCHEDULES["ac_dc"](at, RAMP)) > 0.5
    assert dense.tolist() == [True, False] * 5 + [False]
