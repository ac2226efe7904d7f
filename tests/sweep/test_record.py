"""Rows: what is read from a run, and a file that only grows by whole rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsejax.sweep import Sweep, axis, planned_cost, points, read_table, variants
from sparsejax.sweep.jobs import Job, run_job, write_home
from sparsejax.sweep.record import COLUMNS, Results, read_row
from tests.sweep.small import base

ENTRY = (sys.executable, str(Path(__file__).with_name("fake_entry.py")))
EXPERTS = {"kind": "moe", "experts": 4, "per_token": 2, "hidden": 8}
MASK = {"density": 0.5, "end": 4, "every": 4}


def row_of(folder, axes):
    point = points(Sweep(base=base(), axes=axes))[0]
    return point, run_job(Job(point, folder / point.fingerprint, ENTRY))


def test_a_dense_row_has_its_costs_and_its_curve(tmp_path):
    _, row = row_of(tmp_path, axis("model.width", [16]))
    assert tuple(row) == COLUMNS
    assert json.loads(row["labels"]) == {"width": 16}
    assert row["loss"] == pytest.approx(1 + 50 / 16 + 1000 / 320)
    assert json.loads(row["curve"]) == [[160, row["loss"] + 1], [320, row["loss"]]]
    assert row["parameters_average"] == row["parameters_nonzero"] == 16_000
    assert row["useful_flops"] == 6 * 16_000 * 320
    assert (row["density"], row["experts"], row["dropped"]) == (1.0, 1, "")
    assert row["machine"] == "2 x fake"


@pytest.mark.parametrize(
    ("plan", "density"), [(MASK, 0.5), (MASK | {"dense_from": 5}, 1.0)]
)
def test_a_masked_row_averages_over_the_steps(tmp_path, plan, density):
    point, row = row_of(tmp_path, variants("kind", {"masked": {"masked": plan}}))
    # One matrix of 16 x 16 is half dense for five of the ten steps.
    assert (row["density"], row["density_average"]) == (density, 0.75)
    whole = planned_cost(point.values)
    assert row["parameters_average"] == whole.total - 0.25 * 256
    each = whole.useful_flops - 6 * 0.25 * 256
    assert row["useful_flops"] == pytest.approx(each * 320)


def test_a_routed_row_has_its_balance(tmp_path):
    _, row = row_of(tmp_path, variants("kind", {"routed": {"model.ffn": EXPERTS}}))
    assert (row["experts"], row["granularity"]) == (4, 2)
    assert row["load_violation"] == pytest.approx(1.0)
    assert row["dropped"] == 0


def test_a_run_of_another_config_gives_no_row(tmp_path):
    one, two = points(Sweep(base=base(), axes=axis("model.width", [16, 32])))
    job = Job(one, tmp_path / one.fingerprint, ENTRY)
    subprocess.run(write_home(job), check=True)
    with pytest.raises(ValueError, match=f"holds the run {one.fingerprint}, not"):
        read_row(job.home, two)
    with pytest.raises(ValueError, match="no finished run"):
        read_row(tmp_path / "nowhere", one)


def line(fingerprint, **changes):
    empty = dict.fromkeys(COLUMNS, "1") | {"labels": '{"kind": "dense"}'}
    return {**empty, "fingerprint": fingerprint, **changes}


def test_rows_are_appended_once_and_read_as_columns(tmp_path):
    results = Results(tmp_path / "a.csv")
    results.check()
    for name, loss in (("x", 2.0), ("y", 3.0), ("x", 9.0)):
        results.append(line(name, loss=loss))
    assert Results(tmp_path / "a.csv").rows == results.rows
    table = read_table("a", folder=tmp_path)
    np.testing.assert_array_equal(table["loss"], [2.0, 3.0])
    assert table["kind"].tolist() == ["dense", "dense"]
    assert read_table("a", folder=tmp_path, where={"loss": 3.0})["loss"] == [3.0]
    with pytest.raises(ValueError, match="no rows where"):
        read_table("a", folder=tmp_path, where={"kind": "masked"})


def test_columns_are_those_of_all_rows(tmp_path):
    results = Results(tmp_path / "a.csv")
    for name, labels in (
        ("x", {"kind": "dense", "layers": [1]}),
        ("y", {"experts_of": 8, "layers": [1, 2], "clip": None}),
    ):
        loads = {"load_violation": "" if name == "x" else 0.5}
        results.append(line(name, labels=json.dumps(labels), **loads))
    table = read_table("a", folder=tmp_path)
    np.testing.assert_array_equal(table["experts_of"], [np.nan, 8])
    np.testing.assert_array_equal(table["load_violation"], [np.nan, 0.5])
    assert table["kind"].tolist() == ["dense", ""]
    assert table["layers"].tolist() == [[1], [1, 2]]
    assert table["clip"].tolist() == ["", None]


def test_a_row_that_was_cut_off_is_dropped_and_the_others_stay(tmp_path):
    path = tmp_path / "a.csv"
    Results(path).append(line("x"))
    whole = path.read_text()
    path.write_text(whole + "y,half a r")
    assert [row["fingerprint"] for row in Results(path).rows] == ["x"]
    assert path.read_text() == whole


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("fingerprint,price\nx,2\n")
    with pytest.raises(ValueError, match=r"has other columns .*price.*move the"):
        Results(path)
    path.write_text(",".join(reversed(COLUMNS)) + "\n")
    with pytest.raises(ValueError, match="their order"):
        Results(path)
