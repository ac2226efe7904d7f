import csv

from sparsejax.attention import METHODS
from sparsejax.bench import cached as bench
from sparsejax.bench import table


def test_every_method_with_a_cache_is_compared():
    named = {name for name, method in METHODS.items() if method.causal}
    assert set(bench.configs()) == named | {"window"}


def test_rows_say_what_a_step_costs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    flags = ["--rounds=1", "--methods", "window", "moba", "--cached", "600"]
    assert bench.main(flags) == 0
    with (tmp_path / "cached.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["cached"]) for row in rows] == [
        ("window", "600"),
        ("moba", "600"),
    ]
    assert all(float(row["ours_ms"]) > 0 for row in rows)
    assert "| moba | 600 |" in capsys.readouterr().out
