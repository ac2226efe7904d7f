import csv

from sparsejax.bench import memory as bench
from sparsejax.bench import table


def test_the_table_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    for name, size in (("TOKENS", 8), ("WIDTH", 4), ("HEADS", 2), ("PER_HEAD", 2)):
        monkeypatch.setattr(bench, name, size)
    flags = ["--rounds=1", "--lookups", "256", "1024", "--slots", "256", "1024"]
    assert bench.main(flags) == 0
    with (tmp_path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["work"], row["training"], row["slots"]) for row in rows] == [
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
    assert "| step | 1024 | rows |" in capsys.readouterr().out
