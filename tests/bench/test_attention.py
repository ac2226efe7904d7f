import csv

import jax
import numpy as np
import pytest

from sparsejax.attention import block_sparse_attention, causal, sliding_window
from sparsejax.bench import attention as bench
from sparsejax.bench import table

WORK = bench.Work("window", 512, False, sliding_window(256))


def test_everybody_does_the_same_work():
    arrays = WORK.inputs()
    ours = block_sparse_attention(*arrays, WORK.mask())
    dense = bench.dense(WORK.pattern, WORK.length)(*arrays)
    np.testing.assert_allclose(ours, dense, atol=2e-6)


@pytest.mark.filterwarnings("ignore")  # of PyTorch
def test_peers_do_the_same_work():
    peers = pytest.importorskip("sparsejax.bench.peers", reason="PyTorch is an extra")
    arrays, ours = WORK.inputs(), block_sparse_attention(*WORK.inputs(), WORK.mask())
    size = {"length": WORK.length}
    for run in (
        peers.sdpa(arrays, WORK.pattern, backward=False, **size),
        peers.flex(arrays, WORK.pattern, **size),
    ):
        np.testing.assert_allclose(ours, peers.torch.movedim(run(), 1, 2), atol=2e-6)
    grads = peers.sdpa(arrays, WORK.pattern, backward=True, **size)()
    assert [g.shape for g in grads] == [(1, 4, 512, 64)] * 3


def test_flops_are_those_of_the_live_blocks():
    work = WORK._replace(pattern=causal())
    pairs = 10 * 128 * 128  # 4 + 3 + 2 + 1 blocks
    assert work.flops() == 2 * (2 * pairs * 64) * 4
    assert work._replace(backward=True).flops() == 2 * (7 * pairs * 64) * 4


def test_a_race_goes_in_turns_of_two_of_which_the_second_counts():
    calls = []
    times = bench.race(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        seconds=100.0,
    )
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 3]
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_ratios_are_taken_within_a_turn():
    # The machine slows down by ten in the third turn: the ratio does not notice.
    times = {"dense": [2.0, 2.0, 20.0], "ours": [1.0, 1.0, 10.0]}
    assert bench.ratio(times, "dense", "ours") == 2


def test_peak_memory_grows_with_the_length_and_not_its_square():
    work = WORK._replace(backward=True)
    short, long = (bench.peak(work._replace(length=n)) for n in (1024, 4096))
    assert 2 < long / short < 5


def test_the_table_has_a_row_for_each_work_and_is_written(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "works", lambda lengths: [WORK])
    assert bench.main(["--rounds=1", "--lengths=512"]) == 0
    with (tmp_path / "attention.csv").open() as file:
        row, proportion = csv.DictReader(file)
    assert row["work"] == "window"
    assert float(row["ours_ms"]) > 0
    assert float(row["dense_ratio"]) > 0
    assert row["commit"]
    assert proportion["ours_ms"].endswith("times")
    assert "times dense XLA" in capsys.readouterr().out


def test_rows_with_huge_pages_lie_beside_those_without(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "works", lambda lengths: [WORK])
    monkeypatch.setattr(bench, "row", lambda work, **pace: {"work": work.name})
    monkeypatch.setattr(bench, "proportion", lambda length, **pace: {"work": "both"})
    monkeypatch.setattr(bench, "markdown", lambda rows, columns: "")
    for tunables in ("", table.HUGE, ""):
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
        bench.main(["--lengths=512"])
    works = [row["work"] for row in table.read_rows("attention")]
    assert works == ["window, huge pages", "both, huge pages", "window", "both"]


def test_the_default_works_cover_both_passes():
    found = bench.works([1024, 2048, 4096])
    assert {w.passes for w in found} == {"forward", "forward + backward"}
    assert all(isinstance(w.mask().ids, np.ndarray) for w in found)
    jax.clear_caches()
