import csv

import jax.numpy as jnp
import pytest

from pallas_kernels import gpu
from sparsejax.bench import memory as bench
from sparsejax.bench import table
from tests.interpreters import gpu_interpreted


def test_the_table_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    sizes = {"TOKENS": 8, "WIDTH": 4, "HEADS": 2, "PER_HEAD": 2, "COPIED": 4096}
    for name, size in sizes.items():
        monkeypatch.setattr(bench, name, size)
    flags = ["--rounds=1", "--lookups", "256", "1024", "--slots", "256", "1024"]
    assert bench.main(flags) == 0
    with (tmp_path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["work"], row["training"], row["slots"]) for row in rows] == [
        ("copy", "", ""),
        ("lookup", "", "256"),
        ("lookup", "", "1024"),
        ("lookup, exponent of slots", "", ""),
        ("step", "rows", "256"),
        ("step", "rows", "1024"),
        ("step, rows given", "rows", "256"),
        ("step, rows given", "rows", "1024"),
        ("step", "dense", "256"),
        ("step", "dense", "1024"),
    ]
    steps = [row for row in rows if row["work"].startswith("step")]
    assert all(float(row["ms"]) > 0 and float(row["peak"]) >= 1 for row in steps)
    assert [row["growth"] for row in steps[::2]] == ["1", "1", "1"]
    assert all(float(row["rate"]) > 0 for row in rows if row["growth"])
    assert float(rows[0]["rate"]) > 0
    assert "| step | 1024 | rows |" in capsys.readouterr().out


@gpu_interpreted
def test_kernels_that_can_run_here_have_rows_beside_the_plain_search(monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 8)
    with gpu.interpreted():
        rows = [*bench.lookups([256, 1024], {"rounds": 1, "seconds": 1.0})]
    plain, kernel = rows[:3], rows[3:]
    assert [row["work"] for row in plain] == ["lookup"] * 2 + [
        "lookup, exponent of slots"
    ]
    assert [row["work"] for row in kernel] == [
        row["work"].replace("lookup", "lookup, mosaic_gpu") for row in plain
    ]


def test_a_kernel_that_finds_others_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 8)
    wrong = {"wrong": lambda *halves, k: bench.IMPLEMENTATIONS["xla"](*halves, k=k) + 1}
    monkeypatch.setattr(bench, "IMPLEMENTATIONS", bench.IMPLEMENTATIONS | wrong)
    with pytest.raises(SystemExit, match="wrong finds others of 256 slots than xla"):
        [*bench.lookups([256], {"rounds": 1, "seconds": 1.0})]


def test_bytes_are_of_rows_that_are_read_and_of_distinct_ones_that_move(monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 10)
    ids = jnp.array([[3, 1], [1, 1], [3, 7]])
    read = 2 * 2 * 6 * 40  # tables, passes, reads, bytes of a row
    moved = 2 * 2 * 3 * (3 * 40 + 4)  # in and out: row, two moments, one count
    assert bench.moved_by(ids) == read + moved
