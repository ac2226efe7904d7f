"""Allocations: the budget is met, dense is the limit, names are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import ALLOCATIONS, Layer
from sparsejax.masked.budgets import split

LAYERS = {
    "small": Layer((4, 8)),
    "stack": Layer((32, 64), 6),
    "kernel": Layer((3, 3, 16, 32)),
}
ARGUMENTS = {"by_path": {"densities": {}}}


def total(densities):
    return sum(d * LAYERS[p].size * LAYERS[p].copies for p, d in densities.items())


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@given(density=st.floats(0.001, 1))
def test_every_allocation_meets_the_budget(name, density):
    given = ALLOCATIONS[name](LAYERS, density, **ARGUMENTS.get(name, {}))
    assert set(given) == set(LAYERS)
    assert all(0 < d <= 1 for d in given.values())
    assert total(given) == pytest.approx(total(dict.fromkeys(LAYERS, density)))


def test_erk_is_proportional_to_sum_over_product():
    given = ALLOCATIONS["erk"](LAYERS, 0.01)
    scale = given["stack"] / ((32 + 64) / (32 * 64))
    assert given["kernel"] == pytest.approx(scale * (3 + 3 + 16 + 32) / (9 * 16 * 32))


def test_er_counts_channels_where_erk_counts_the_sides_of_a_kernel_too():
    given, matrices = ALLOCATIONS["er"](LAYERS, 0.01), {"stack": LAYERS["stack"]}
    scale = given["stack"] / ((32 + 64) / (32 * 64))
    assert given["kernel"] == pytest.approx(scale * (16 + 32) / (16 * 32))
    assert ALLOCATIONS["er"](matrices, 0.1) == ALLOCATIONS["erk"](matrices, 0.1)


def test_erk_makes_dense_what_would_exceed_dense():
    given = ALLOCATIONS["erk"](LAYERS, 0.3)
    assert given["small"] == 1.0
    assert given["stack"] < 1


@pytest.mark.parametrize("name", ["uniform", "er", "erk"])
def test_layers_may_be_kept_dense_and_the_others_pay(name):
    given = ALLOCATIONS[name](LAYERS, 0.4, dense=("^kernel",))
    assert given["kernel"] == 1.0
    assert given["stack"] < 0.4
    assert total(given) == pytest.approx(total(dict.fromkeys(LAYERS, 0.4)))


def test_a_density_below_what_is_kept_dense_is_refused():
    # 4608 of 16928 weights
    with pytest.raises(ValueError, match=r"density=0.2: what .* whole is 0.272"):
        ALLOCATIONS["erk"](LAYERS, 0.2, dense=("^kernel",))
    with pytest.raises(ValueError, match="'kernl' matches no masked path"):
        ALLOCATIONS["uniform"](LAYERS, 0.2, dense=("kernl",))


def test_erk_without_power_is_uniform():
    assert ALLOCATIONS["erk"](LAYERS, 0.3, power=0.0) == pytest.approx(
        dict.fromkeys(LAYERS, 0.3)
    )


def test_by_path_takes_the_longest_match_and_falls_back():
    given = ALLOCATIONS["by_path"](LAYERS, 0.5, densities={"s": 0.2, "st": 0.1})
    assert given == {"small": 0.2, "stack": 0.1, "kernel": 0.5}


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_by_path_refuses_what_is_no_density(density):
    with pytest.raises(ValueError, match=r"densities\['s'\].*must be in \(0, 1\]"):
        ALLOCATIONS["by_path"](LAYERS, 0.5, densities={"s": density})


def test_by_path_names_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'kernl' matches no .*did you mean 'kernel'"):
        ALLOCATIONS["by_path"](LAYERS, 0.5, densities={"kernl": 0.1})


def slow_split(total, strength, room):
    """One weight at a time, to whom most is still due."""
    share = np.zeros(len(room))
    free = np.ones(len(room), bool)
    while True:  # what a full layer cannot take goes to the others
        rest = total - np.sum(room[~free])
        share = np.where(free, rest * strength / strength[free].sum(), room)
        if not (free & (share > room)).any():
            return share
        free &= share <= room


@given(seed=st.integers(0, 99), fill=st.floats(0, 1))
def test_splitting_loses_nothing_and_follows_strength(seed, fill):
    draw = np.random.default_rng(seed)
    room, strength = draw.integers(1, 400, 5), draw.uniform(0.01, 1, 5)
    whole = int(fill * room.sum())
    given = np.asarray(jitted(jnp.int32(whole), jnp.float32(strength), jnp.int32(room)))
    assert given.sum() == whole
    assert (given <= room).all()
    assert (given >= 0).all()
    expected = slow_split(whole, strength, room) if whole < room.sum() else room
    # each is rounded to a neighbour
    assert np.abs(given - expected).max() < 1.01


def test_splitting_among_layers_without_strength_is_even():
    room = jnp.int32([2, 100, 100, 1, 100])
    given = jitted(jnp.int32(15), jnp.zeros(5), room)
    assert given.tolist() == [2, 4, 4, 1, 4]


jitted = jax.jit(split)
