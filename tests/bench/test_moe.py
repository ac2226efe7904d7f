import csv

import jax.numpy as jnp
import numpy as np

from sparsejax.bench import moe as bench
from sparsejax.bench import table


def test_the_rows_of_a_skewed_router_are_all_counted():
    sizes = bench.skewed(256, 8)
    assert sizes.sum() == 256
    assert sizes.max() > 2 * sizes.min()
    assert sizes.dtype == jnp.int32


def test_the_table_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    for name, size in (("ROWS", 64), ("TOKENS", 32), ("WIDTH", 16), ("HIDDEN", 8)):
        monkeypatch.setattr(bench, name, size)
    assert bench.main(["--rounds=1", "--experts", "4"]) == 0
    with (tmp_path / "moe.csv").open() as file:
        rows = list(csv.DictReader(file))
    works = [(r["work"], r["experts"], r["pass"]) for r in rows]
    beside = {("grouped", "4"): "ragged_dot", ("gate, up", "8"): "fused"}
    beside[("layer", "8")] = "moving"
    assert works == [(*work, p) for work in beside for p in bench.PASSES]
    for row in rows:
        other = beside[row["work"], row["experts"]]
        assert all(float(row[f"{name}_ratio"]) > 0 for name in ("dense", other))
    assert "| grouped | 4 | forward |" in capsys.readouterr().out


def test_one_wide_product_is_the_two_that_it_stands_for(monkeypatch):
    for name, size in (("ROWS", 64), ("WIDTH", 16), ("HIDDEN", 8)):
        monkeypatch.setattr(bench, name, size)
    runners = bench.gated(backward=False)
    np.testing.assert_allclose(
        runners["fused"](), runners["ours"](), rtol=1e-5, atol=1e-6
    )
