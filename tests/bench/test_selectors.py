import csv

import numpy as np
import pytest

from sparsejax.attention import METHODS, causal
from sparsejax.bench import selectors as bench
from sparsejax.bench import table
from sparsejax.bench.attention import Work, dense


@pytest.mark.slow
def test_a_mixer_that_reads_every_block_is_dense():
    q, k, v = Work("", 256, False, causal()).inputs()
    # Three blocks of MoBA are more than the two there are.
    with pytest.raises(ValueError, match="top=3"):
        bench.mixer("moba", 256)(q, k, v)
    q, k, v = Work("", 384, False, causal()).inputs()
    expected = dense(causal(), 384)(q, k, v)
    np.testing.assert_allclose(bench.mixer("moba", 384)(q, k, v), expected, atol=2e-6)


def test_the_crossover_is_where_the_method_stays_faster():
    def rows(*ratios):
        return [
            {"length": str(2**n), "dense_ratio": str(ratio)}
            for n, ratio in enumerate(ratios)
        ]

    assert bench.crossover(rows(0.5, 1.2, 0.9, 1.1, 3)) == 8
    assert bench.crossover(rows(1.1, 2)) == 1
    assert bench.crossover(rows(0.5, 1)) is None


def test_the_table_and_its_picture_are_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "DOCUMENT", tmp_path / "page.md")
    begin, end = bench.MARKS
    bench.DOCUMENT.write_text(f"head\n{begin}old{end}\ntail\n")
    about = {"pass": "forward", "ours_ms": "1", "dense_ms": "2", "dense_ratio": "2"}
    old = [{"method": "dma", "length": "256"} | about]
    old += [old[0] | {"pass": "forward + backward", "dense_ratio": "0.5"}]
    table.write_rows("selectors", [*old, old[0] | {"method": "moba", "length": "512"}])
    flags = ["--rounds=1", "--lengths", "256", "512", "--methods", "moba"]
    assert bench.main(flags) == 0
    with (tmp_path / "selectors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["length"], r["pass"]) for r in rows] == [
        ("dma", "256", "forward"),
        ("dma", "256", "forward + backward"),
        ("moba", "512", "forward"),
        ("moba", "512", "forward + backward"),
    ]
    assert all(float(row["dense_ratio"]) > 0 for row in rows)
    said = capsys.readouterr()
    page = bench.DOCUMENT.read_text()
    assert page == f"head\n{begin}\n{bench.summary(rows)}\n\n{end}\ntail\n"
    assert "| `dma` | 256 | not yet | 256 | 0.5 |" in page
    assert bench.summary(rows) in said.out
    assert "top=3" in said.err  # why 256 has no row
    assert (tmp_path / "selectors.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "choosing.csv").exists()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_measured(method):
    assert callable(bench.mixer(method, 1024))


def test_the_page_says_what_the_results_do():
    assert bench.summary(table.read_rows("selectors")) in bench.DOCUMENT.read_text()
