"""Allocations: the budget is met, dense is the limit, names are checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import ALLOCATIONS, Layer

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


def test_erk_makes_dense_what_would_exceed_dense():
    given = ALLOCATIONS["erk"](LAYERS, 0.3)
    assert given["small"] == 1.0
    assert given["stack"] < 1


def test_erk_without_power_is_uniform():
    assert ALLOCATIONS["erk"](LAYERS, 0.3, power=0.0) == pytest.approx(
        dict.fromkeys(LAYERS, 0.3)
    )


def test_by_path_takes_the_first_match_and_falls_back():
    given = ALLOCATIONS["by_path"](LAYERS, 0.5, densities={"st": 0.1, "s": 0.2})
    assert given == {"small": 0.2, "stack": 0.1, "kernel": 0.5}


def test_by_path_names_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'kernl' matches no .*did you mean 'kernel'"):
        ALLOCATIONS["by_path"](LAYERS, 0.5, densities={"kernl": 0.1})
