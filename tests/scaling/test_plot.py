"""Figures of fits: what is drawn, and that axes say what they show."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from sparsejax.scaling import LAWS, chinchilla_optimum, fit, valleys
from sparsejax.scaling.plot import fit_curves, residual_plot, valley_plot

TRUE = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
N, D = np.repeat([1e6, 1e7, 1e8], 3), np.tile([1e8, 1e9, 1e10], 3)
TABLE = {"parameters": N, "tokens": D, "kind": np.array(["a", "b", "c"] * 3)}
TABLE["loss"] = LAWS["chinchilla"](TRUE, TABLE)


@pytest.fixture
def axes():
    return Figure().subplots()


@pytest.fixture(scope="module")
def found():
    return fit(LAWS["chinchilla"], TABLE, fixed=TRUE)


def labels(axes):
    return axes.get_xlabel(), axes.get_ylabel()


def test_residuals_are_drawn_for_every_row_and_group(axes, found):
    residual_plot(axes, found, TABLE, by="kind")
    assert [len(line.get_xdata()) for line in axes.lines[:3]] == [3, 3, 3]
    assert labels(axes) == (
        "expected loss (nats per token)",
        "measured above expected loss (%)",
    )
    residual_plot(Figure().subplots(), found, TABLE)


def test_a_law_is_drawn_through_the_points_it_fits(axes, found):
    fit_curves(axes, found, TABLE, x="tokens", by="parameters")
    points, curve = axes.lines[:2]
    ends = curve.get_ydata()[[0, -1]]
    np.testing.assert_allclose(points.get_ydata()[[0, -1]], ends, rtol=1e-9)
    assert labels(axes) == ("tokens", "loss (nats per token)")


def test_valleys_are_drawn_with_their_bottoms(axes):
    best = chinchilla_optimum(TRUE, 1e18)
    sizes = best.parameters * np.geomspace(0.5, 2, 5)
    table = {"parameters": sizes, "flops": np.full(5, 1e18)}
    at = {"parameters": sizes, "tokens": 1e18 / 6 / sizes}
    table["loss"] = LAWS["chinchilla"](TRUE, at)
    found = valleys(table)
    valley_plot(axes, found, table)
    assert axes.lines[-1].get_xdata()[0] == pytest.approx(best.parameters, rel=0.02)
    assert labels(axes) == ("parameters", "loss (nats per token)")
