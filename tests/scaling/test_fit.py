"""Fits find the coefficients that made the data, and say what they cannot do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.scaling import LAWS, fit

SIZES, DATA = np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 5)
N, D = (x.ravel() for x in np.meshgrid(SIZES, DATA))
LAW = LAWS["chinchilla"]
TRUE = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
GRID = {"parameters": N, "tokens": D}


def table(true=TRUE, noise=0.0, seed=0):
    error = np.random.default_rng(seed).normal(0, noise, N.size) if noise else 0.0
    return {**GRID, "loss": LAW(true, GRID) * np.exp(error)}


@settings(max_examples=5)
@given(
    floor=st.floats(0.5, 2.5),
    alpha=st.floats(0.2, 0.6),
    beta=st.floats(0.2, 0.6),
)
def test_a_fit_recovers_the_coefficients_that_made_the_data(floor, alpha, beta):
    true = {**TRUE, "E": floor, "alpha": alpha, "beta": beta}
    found = fit(LAW, table(true), starts=3)
    for name, value in true.items():
        assert found.coefficients[name] == pytest.approx(value, rel=1e-3)
    assert found.error < 1e-7


@pytest.mark.parametrize("name", ["routed", "sparse_attention"])
def test_a_law_without_a_floor_is_recovered_too(name):
    law, random = LAWS[name], np.random.default_rng(1)
    at = {"parameters": N, "experts": random.choice([1, 4, 32, 256], N.size)}
    at |= {"length": random.uniform(1e3, 1e5, N.size)}
    at |= {"density": random.uniform(0.05, 1, N.size)}
    middle = {
        k: np.sqrt(s.low * s.high) if s.positive else 0.4 * s.low + 0.6 * s.high
        for k, s in law.starts.items()
    }
    found = fit(law, {**at, "loss": law(middle, at)}, delta=None, starts=4)
    for key, value in middle.items():
        assert found.coefficients[key] == pytest.approx(value, rel=0.01)


def test_intervals_hold_the_truth_and_one_outlier_moves_little():
    data = table(noise=0.003)
    data["loss"][7] *= 2
    found = fit(LAW, data, starts=3, bootstrap=40)
    for name, (low, high) in found.intervals.items():
        assert low < high
        assert low / 1.15 < TRUE[name] < high * 1.15
    assert found.coefficients["E"] == pytest.approx(1.8, rel=0.03)
    assert found.residuals[7] == pytest.approx(np.log(2), rel=0.03)


def test_rows_that_are_held_out_are_judged_by_and_not_fitted_to():
    large, data = N > 5e8, table()
    data["loss"][large] *= 1.1
    found = fit(LAW, data, held_out=large, starts=3)
    assert found.coefficients["A"] == pytest.approx(480, rel=1e-3)
    assert found.error < 1e-6
    assert found.held_out_error == pytest.approx(np.log(1.1), rel=1e-3)
    assert fit(LAW, data, starts=1).held_out_error is None


def test_coefficients_that_are_given_stay_as_they_are():
    given = {"E": 1.8, "alpha": 0.35}
    found = fit(LAW, table(), fixed=given, starts=2)
    assert found.fixed == ("E", "alpha")
    assert {k: found.coefficients[k] for k in given} == given
    assert found.coefficients["B"] == pytest.approx(2100, rel=1e-3)
    everything = fit(LAW, table(), fixed=TRUE)
    assert everything.coefficients == TRUE
    assert everything.error < 1e-12


def test_a_fit_is_the_same_every_time_and_predicts():
    one, two = (fit(LAW, table(noise=0.01), starts=2, bootstrap=2) for _ in range(2))
    assert one.coefficients == two.coefficients
    assert one.intervals == two.intervals
    assert one.predict({"parameters": 1e8, "tokens": 1e10}) == pytest.approx(
        LAW(TRUE, {"parameters": 1e8, "tokens": 1e10}), rel=0.02
    )


def with_loss(index, value):
    data = table()
    data["loss"][index] = value
    return data


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (with_loss(3, np.nan), {}, r"loss=nan in row 3: must be finite and positive"),
        (with_loss(3, np.inf), {}, r"loss=inf in row 3: .*leave out the runs that div"),
        (with_loss(2, -1.0), {}, r"loss=-1.0 in row 2"),
        ({**table(), "tokens": D[:4]}, {}, r"'tokens' has shape \(4,\): .*as long"),
        ({"loss": N, "tokens": D}, {}, "no column 'parameters': this law reads"),
        (table(), {"fixed": {"e": 1.0}}, "fixed='e': no such coefficient; one of E"),
        (
            {k: v[:4] for k, v in table().items()},
            {},
            "4 rows to fit 5 coefficients to: need at least one each; add runs",
        ),
        (table(), {"held_out": N > 1.1e6}, "5 rows|rows to fit"),
        (table(), {"held_out": [True]}, r"held_out has shape \(1,\): must be \(30,\)"),
    ],
)
def test_a_fit_says_what_is_wrong_with_its_table(data, options, message):
    if "held_out" in options and len(options["held_out"]) == N.size:
        options = {"held_out": np.arange(N.size) > 3}
        message = "4 rows to fit 5 coefficients"
    with pytest.raises(ValueError, match=message):
        fit(LAW, data, **options)
