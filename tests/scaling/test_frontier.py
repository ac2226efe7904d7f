"""Budgets: numeric allocation against the closed form, valleys, power laws."""

import numpy as np
import pytest

from sparsejax.scaling import (
    LAWS,
    allocate,
    chinchilla_optimum,
    frontier,
    power_law,
    valleys,
)

TRUE = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
BUDGETS = (1e18, 1e20, 1e22)


def loss(parameters, tokens):
    return LAWS["chinchilla"](TRUE, {"parameters": parameters, "tokens": tokens})


@pytest.mark.parametrize("flops", BUDGETS)
def test_allocation_is_the_closed_form_of_chinchilla(flops):
    found, expected = allocate(loss, flops), chinchilla_optimum(TRUE, flops)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-4)
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    assert 6 * found.parameters * found.tokens == pytest.approx(flops)


def test_at_the_optimum_size_and_data_are_worth_the_same():
    _, n, d, _ = chinchilla_optimum(TRUE, 1e20)
    size = TRUE["alpha"] * TRUE["A"] / n ** TRUE["alpha"]
    data = TRUE["beta"] * TRUE["B"] / d ** TRUE["beta"]
    assert size == pytest.approx(data)


def test_the_frontier_is_a_power_law_with_chinchillas_exponent():
    points = frontier(loss, BUDGETS)
    exponent, factor = power_law(
        [p.flops for p in points], [p.parameters for p in points]
    )
    assert exponent == pytest.approx(0.37 / 0.72, rel=1e-4)
    assert factor * 1e20**exponent == pytest.approx(points[1].parameters, rel=1e-4)
    assert [p.loss for p in points] == sorted((p.loss for p in points), reverse=True)


def test_the_best_granularity_is_finite_and_grows_with_the_budget():
    c = {"c": 0.47, "g": 2.1, "gamma": 0.58, "a": 18.1}
    c |= {"alpha": 0.115, "b": 30.8, "beta": 0.147}

    def best(flops):
        found = {}
        for fine in 2.0 ** np.arange(10):

            def at(n, d, fine=fine):
                point = {"parameters": n, "tokens": d, "granularity": fine}
                return LAWS["fine_grained"](c, point)

            def per_token(n, fine=fine):  # of 64 times expanded layers, and a router
                width = (n / 43 / 12 / 24) ** 0.5
                return (72 * width**2 + width * 64 * fine * 14) * 24

            found[fine] = allocate(at, flops, per_token=per_token).loss
        return min(found, key=lambda fine: found[fine])

    chosen = [best(flops) for flops in (1e18, 1e20, 1e23)]
    assert chosen == sorted(chosen)
    assert 1 < chosen[0] <= chosen[-1] < 512


def test_an_allocation_without_a_minimum_is_refused():
    with pytest.raises(ValueError, match="loss is least at the end of sizes"):
        allocate(loss, 1e20, sizes=(1e3, 1e6))


def grid(shift=1.0):
    rows = []
    for flops in BUDGETS:
        best = chinchilla_optimum(TRUE, flops).parameters * shift
        sizes = best * np.geomspace(0.25, 4, 7)
        rows += [(flops * 1.001, size, flops * 1.001 / 6 / size) for size in sizes]
    flops, sizes, data = np.array(rows).T
    losses = loss(sizes, data)
    return {"flops": flops, "parameters": sizes, "tokens": data, "loss": losses}


def test_valleys_lie_where_the_law_has_its_optimum():
    found = valleys(grid())
    assert [v.flops for v in found] == pytest.approx([f * 1.001 for f in BUDGETS])
    for valley in found:
        best = chinchilla_optimum(TRUE, valley.flops)
        assert valley.parameters == pytest.approx(best.parameters, rel=0.05)
        assert valley.loss == pytest.approx(best.loss, rel=1e-3)
        assert 6 * valley.parameters * valley.tokens == pytest.approx(valley.flops)
        assert valley.inside


def test_a_valley_says_when_its_bottom_was_not_run():
    assert not any(v.inside for v in valleys(grid(shift=8.0)))


def test_few_sizes_or_a_hill_make_no_valley():
    table = {"flops": np.full(3, 1e18), "parameters": np.array([1e6, 2e6, 4e6])}
    assert valleys({**table, "loss": np.array([1.0, 2.0, 1.0])}) == []
    assert valleys({k: v[:2] for k, v in {**table, "loss": np.ones(3)}.items()}) == []


def test_a_power_law_needs_two_points():
    with pytest.raises(ValueError, match="needs two different x"):
        power_law([1.0, 1.0], [2.0, 3.0])
