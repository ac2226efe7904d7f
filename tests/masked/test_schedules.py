"""Schedules: both ends exact, never rising, and each one's own curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import SCHEDULES, Ramp, window

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


def test_halving_keeps_a_half_then_a_quarter_in_equal_frames():
    ramp = Ramp(initial=15 / 16, final=1 / 16, begin=10, end=50)
    density = np.asarray(SCHEDULES["halving"](STEPS, ramp))
    assert density[STEPS == 10] == np.float32(15 / 16)
    for frame, expected in enumerate((1 / 2, 1 / 4, 1 / 8, 1 / 16)):
        inside = (10 + 10 * frame < STEPS) & (20 + 10 * frame >= STEPS)
        assert set(density[np.asarray(inside)].tolist()) == {expected}


# Steps in all, first and last of pruning, density: of published runs (2501.12486).
CARDS = [(11200, 2500, 8100, 0.8), (13050, 2500, 8875, 0.6), (16375, 2500, 10100, 0.4)]


@pytest.mark.published("first and last pruning of three published runs, within 1 %")
@pytest.mark.parametrize(("steps", "begin", "end", "density"), CARDS)
def test_a_window_of_compute_is_that_of_published_runs(steps, begin, end, density):
    found = window(steps, density, every=25)
    # they round steps to their reports
    assert found.begin == pytest.approx(begin, rel=0.01)
    assert found.end == pytest.approx(end, rel=0.01)


@pytest.mark.parametrize(("first", "last"), [(0.25, 0.75), (0.0, 0.5), (0.5, 1.0)])
def test_a_window_has_the_fractions_of_the_sum_of_density(first, last):
    found = window(100_000, 0.3, first=first, last=last, every=10)
    ramp = Ramp(1.0, 0.3, *found, every=10)
    spent = np.cumsum(np.asarray(SCHEDULES["geometric"](jnp.arange(100_000), ramp)))
    at = spent[[max(found.begin, 0), found.end - 1]] / spent[-1]
    np.testing.assert_allclose(at, (first, last), atol=2e-3)


def test_a_window_without_a_pruning_is_refused():
    with pytest.raises(ValueError, match="prune more often"):
        window(100, 0.5, every=500)
