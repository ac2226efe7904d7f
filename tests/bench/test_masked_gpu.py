import csv

from sparsejax.bench import masked_gpu as bench
from sparsejax.bench import table


def test_the_table_is_written_with_the_density_that_breaks_even(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    sizes = {"ROWS": 16, "WIDTH": 32, "IMPLEMENTATION": "xla"}  # on any machine
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)

    def alike(run, wait):
        wait(run())
        return 1e-3

    monkeypatch.setattr(bench, "seconds", alike)
    assert bench.main(["--rounds=1", "--blocks", "8", "--densities", "0.25"]) == 0
    with (tmp_path / "masked_gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pass"] for row in rows] == list(bench.PASSES)
    assert {row["dense_ratio"] for row in rows} == {"1"}
    assert {row["break_even"] for row in rows} == {"> 0.25"}
    assert "| 8 | forward | 0.25 |" in capsys.readouterr().out
