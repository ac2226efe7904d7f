"""What is kept of the frontier is what its rows give when they are read again."""

import numpy as np
import pytest

from sparsejax.bench import frontier
from sparsejax.bench.table import read_rows
from sparsejax.scaling import LAWS, fit


@pytest.fixture(scope="module")
def table():
    return frontier.columns(read_rows("frontier"))


def kept(law):
    return {
        r["what"]: float(r["value"])
        for r in read_rows("frontier_fits")
        if r["law"] == law
    }


def test_the_fit_that_is_kept_is_found_again(table):
    plain = frontier.rows_of(table, table["kind"] == frontier.BASE)
    again = fit(LAWS["average_parameters"], plain, starts=2)
    before = kept("average_parameters")
    assert again.error == pytest.approx(before["error of the rows fitted"], rel=0.02)
    at = {"average": np.array([4e5]), "tokens": np.array([1e6])}
    expected = LAWS["average_parameters"](before, at)
    assert again.predict(at) == pytest.approx(expected, rel=2e-3)


def test_runs_that_were_predicted_are_in_no_fit(table):
    larger = frontier.columns(read_rows("frontier_next"))
    assert larger["tokens"].min() > table["tokens"].max()
    for row in read_rows("frontier_predicted"):
        assert float(row["measured"]) in larger["loss"]
        error = float(row["measured"]) / float(row["expected"]) - 1
        assert float(row["error"]) == pytest.approx(error)


def test_the_table_of_losses_has_every_kind_at_every_width():
    lines = frontier.losses(read_rows("frontier")).splitlines()
    assert lines[0] == "| kind | width 32 | width 48 | width 64 | width 96 |"
    assert len(lines) == 2 + 7
    assert not any("|  |" in line for line in lines)
