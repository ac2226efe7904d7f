import csv
import re
import subprocess

import jax
import pytest

from sparsejax.bench import __main__ as command
from sparsejax.bench import comparison, table
from sparsejax.config import ConfigError, convert, fingerprint, read
from sparsejax.train.config import Config


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results of the test's own, which does not exist yet."""
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_what_is_written_is_read_back_as_text(results):
    path = table.write_rows("speed", [{"name": "a, b", "speed": 1.5}])
    assert path == results / "speed.csv"
    assert table.read_rows("speed") == [{"name": "a, b", "speed": "1.5"}]


def test_nothing_measured_is_no_rows(results):
    assert table.read_rows("speed") == []


def test_columns_stand_in_the_order_they_first_appear_and_gaps_are_empty(results):
    rows = [{"b": 1, "a": 2}, {"c": 3, "a": 4}]
    with table.write_rows("speed", iter(rows)).open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines == [["b", "a", "c"], ["1", "2", ""], ["", "4", "3"]]


def test_writing_replaces_what_was_there(results):
    for speed in (1, 2):
        table.write_rows("speed", [{"speed": speed}])
    assert table.read_rows("speed") == [{"speed": "2"}]


def test_provenance_says_which_code_ran_on_what():
    found = table.provenance()
    assert list(found) == ["commit", "date", "machine", "python", "jax"]
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", found["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert re.search(r", \d+ cores(, huge pages)?$", found["machine"])
    assert found["jax"] == jax.__version__


def test_provenance_says_where_memory_comes_in_huge_pages(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", table.HUGE)
    assert table.provenance()["machine"].endswith(" cores, huge pages")
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert table.provenance()["machine"].endswith(" cores")


def test_provenance_outside_of_a_repository_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert table.provenance()["commit"] == "unknown"


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("file", "dirty"), [("results/speed.csv", False), ("code.py", True)]
)
def test_a_changed_file_marks_the_commit_unless_it_is_a_result(
    file, dirty, tmp_path, monkeypatch
):
    (tmp_path / "results").mkdir()
    for name in ("results/speed.csv", "code.py"):
        (tmp_path / name).write_text("before")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    assert not table.provenance()["commit"].endswith("-dirty")
    (tmp_path / file).write_text("after")
    assert table.provenance()["commit"].endswith("-dirty") == dirty


def test_markdown_has_the_columns_that_are_asked_for_under_their_headings():
    rows = [{"name": "a", "speed": 1.5, "unseen": 0}, {"speed": 2, "name": "b"}]
    assert table.markdown(rows, {"name": "model", "speed": "tokens/s"}) == (
        "| model | tokens/s |\n|---|---|\n| a | 1.5 |\n| b | 2 |"
    )


def row(name, bits):
    return {
        "config": name,
        "bits_per_byte": str(bits),
        "parameters_total": "1234567",
        "parameters_nonzero": "1000000",
        "parameters_active": "1234567",
        "useful_flops_per_token": "2340000",
    }


def test_the_comparison_gives_mean_and_range_over_seeds():
    rows = [row("moe", 2.0), row("dense", 3.0), row("moe", 2.5)]
    rows.append(row("moe", 2.1))
    _, _, first, second = comparison.table(rows).splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == [
        *("`moe`", "2.200 (2.000 to 2.500)", "1,234,567", "1,000,000"),
        *("1,234,567", "2.34"),
    ]
    assert second.startswith("| `dense` | 3.000 (3.000 to 3.000) |")


def test_the_fingerprint_is_that_of_the_config_that_runs():
    values = read(table.ROOT / "configs" / "dense.py")
    values["seed"] = 2
    values["model"]["depth"] = 3
    flags = ["--config.model.depth=3"]
    expected = fingerprint(convert(Config, values))
    assert comparison.fingerprint_of("dense", 2, flags) == expected


def test_runs_that_differ_have_different_fingerprints():
    found = {
        comparison.fingerprint_of(name, seed, flags)
        for name in ("dense", "quickstart")
        for seed in (0, 1)
        for flags in ([], ["--config.optim.learning_rate=1e-3"])
    }
    assert len(found) == 8


def test_an_override_that_names_no_field_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        comparison.fingerprint_of("dense", 0, ["--config.model.dept=3"])


def test_what_was_run_is_not_run_again(results, monkeypatch, capsys):
    ran = []

    def run(name, seed, flags):
        ran.append((name, seed))
        return row(name, 2 + seed)

    monkeypatch.setattr(comparison, "run", run)
    for seeds in ("1", "2", "2"):
        comparison.main(["--seeds", seeds, "--configs", "dense", "moe"])
    assert ran == [("dense", 0), ("moe", 0), ("dense", 1), ("moe", 1)]
    assert "2.500 (2.000 to 3.000)" in capsys.readouterr().out
    assert (results / "comparison.png").stat().st_size > 1000


def test_an_unknown_benchmark_gets_a_suggestion(capsys):
    assert command.main(["trian"]) == 2
    assert (
        "bench 'trian': no such name; did you mean 'train'" in capsys.readouterr().err
    )


def test_no_benchmark_gets_the_list(capsys):
    assert command.main([]) == 2
    assert f"one of {', '.join(command.BENCHES)}" in capsys.readouterr().err


def test_a_benchmark_gets_its_own_flags(monkeypatch):
    given = []
    monkeypatch.setattr(comparison, "main", lambda argv: given.append(argv) or 0)
    assert command.main(["comparison", "--seeds", "1"]) == 0
    assert given == [["--seeds", "1"]]
