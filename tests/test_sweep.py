"""The command: every point exactly once, whatever dies; lists, retries, scripts."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from sparsejax.sweep import points
from sparsejax.sweep.engines import ENGINES
from sparsejax.sweep.main import main, read_sweep
from tests.sources import ROOT
from tests.sweep.cluster import two_nodes
from tests.sweep.small import get_sweep

SMALL = ROOT / "tests" / "sweep" / "small.py"
ENTRY = (sys.executable, str(SMALL.with_name("fake_entry.py")))


@pytest.fixture
def sweep(tmp_path):
    """Run the small sweep with the fake entry; gives the exit status."""

    def run(*flags):
        places = [f"--runs={tmp_path}/runs", f"--results={tmp_path}/results"]
        return main([f"--config={SMALL}", *places, *flags], entry=ENTRY)

    return run


NAMED = """
from sparsejax.sweep import Sweep, axis
from tests.sweep.small import base

def get_sweep():
    return Sweep(base=base(), axes=axis("data.seq_len", [16]))
"""


def rows(tmp_path):
    with (tmp_path / "results" / "small.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def starts(tmp_path):
    found = (tmp_path / "runs" / "small").glob("*/starts.txt")
    return [len(path.read_text().split()) for path in found]


def test_every_point_runs_once_and_is_not_run_again(sweep, tmp_path, capsys):
    assert sweep("--workers=2") == 0
    assert len({row["fingerprint"] for row in rows(tmp_path)}) == 4
    assert "4 of 4 points, 0 failed" in capsys.readouterr().err
    assert sweep() == 0
    assert starts(tmp_path) == [1, 1, 1, 1]
    assert len(rows(tmp_path)) == 4


def test_a_list_shows_costs_and_runs_nothing(sweep, tmp_path, capsys):
    assert sweep("--list") == 0
    said = capsys.readouterr().out
    assert "16, 320, seed 0" in said
    assert "FLOPs" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("told", "started"), [("fail", [1, 1, 2, 2]), ("refuse", [1, 1, 1, 1])]
)
def test_a_failure_ends_its_point_only_and_is_retried(
    sweep, tmp_path, monkeypatch, capsys, told, started
):
    monkeypatch.setenv("FAKE", told)
    assert sweep() == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("failed: {'width': 32") == 2
    assert ("out of luck" in said) or ("not today" in said)
    assert len(rows(tmp_path)) == 2
    assert sorted(starts(tmp_path)) == started


def test_an_interrupted_sweep_is_one_line_and_retries_nothing(
    sweep, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FAKE", "interrupted")
    one = f"--only={points(get_sweep())[0].fingerprint}"
    assert sweep(one) == 1  # a run that was interrupted by itself
    assert starts(tmp_path) == [1]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(ENGINES, "local", interrupt)
    assert sweep(one) == 130
    assert "start the same command again" in capsys.readouterr().err


def test_a_run_that_fails_once_is_tried_again(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "fail once")
    assert sweep(f"--only={points(get_sweep())[0].fingerprint}") == 0
    assert starts(tmp_path) == [2]


def test_points_that_finished_unseen_are_collected(sweep, tmp_path):
    assert sweep("--keep") == 0
    assert not (tmp_path / "results").exists()
    for path in (tmp_path / "runs" / "small").glob("*/row.json"):
        path.unlink()  # the reader died between the run and its row
    assert sweep("--collect") == 0
    assert len(rows(tmp_path)) == 4
    assert starts(tmp_path) == [1, 1, 1, 1]


def test_a_killed_worker_and_a_killed_command_lose_no_point(tmp_path):
    code = (
        "import sys; from sparsejax.sweep.main import main;"
        f"sys.exit(main({[f'--config={SMALL}', f'--runs={tmp_path}/runs']!r}"
        f"+ ['--results={tmp_path}/results'], entry={ENTRY!r}))"
    )
    environment = os.environ | {"FAKE": "wait", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "runs").glob("small/*/pid.txt"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    home = next((tmp_path / "runs" / "small").glob("*/pid.txt"))
    os.kill(int(home.read_text()), signal.SIGKILL)  # the worker has lived on
    after = main(
        [
            f"--config={SMALL}",
            f"--runs={tmp_path}/runs",
            f"--results={tmp_path}/results",
        ],
        entry=ENTRY,
    )
    assert after == 0
    assert len({row["fingerprint"] for row in rows(tmp_path)}) == 4
    assert sorted(starts(tmp_path)) == [1, 1, 1, 2]


def test_slurm_gets_an_array_script_for_what_is_missing(sweep, tmp_path, capsys):
    one = sorted(p.fingerprint for p in points(get_sweep()))[0]
    assert sweep(f"--only={one}") == 0
    assert sweep("--engine=slurm") == 0
    script = tmp_path / "runs" / "small" / "array.sh"
    assert f"3 points: sbatch {script}" in capsys.readouterr().out
    text = script.read_text()
    assert "#SBATCH --array=1-3\n" in text
    chosen = script.with_name("points.txt").read_text().split()
    assert sorted([*chosen, one]) == sorted(p.fingerprint for p in points(get_sweep()))
    subprocess.run(["bash", "-n", script], check=True)
    line = next(x for x in text.split("\n") if x.startswith("point="))
    task = f'SLURM_ARRAY_TASK_ID=2; {line}; echo "$point"'
    said = subprocess.run(
        ["bash", "-c", task], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == chosen[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine=lokal"], "--engine=lokal: no such engine; did you mean 'local'?"),
        (["--workers=999"], "--workers=999: must be in 1.."),
        (["--workers=0"], "--workers=0: must be in 1.."),
        (["--devices=0,"], "--devices=0,: must be ids, such as 0,1"),
        (["--retries=-1"], "--retries=-1: must not be negative"),
        (["--devices=0,1", "--workers=3"], "must be in 1..2, the devices"),
        (["--only=0123"], "--only=0123: no such point"),
    ],
)
def test_a_wrong_flag_is_one_line(sweep, capsys, flags, message):
    assert sweep(*flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--runs", "--results"])
def test_a_place_that_cannot_be_written_is_one_line(sweep, tmp_path, capsys, flag):
    (tmp_path / "file").write_text("")
    assert sweep(f"{flag}={tmp_path}/file") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path}/file")
    assert "cannot be written" in said
    assert starts(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_sweep(): return 1", "get_sweep() must return a Sweep"),
        ("x = 1", "AttributeError"),
        ("def get_sweep(): raise KeyError('a')", "KeyError: 'a'"),
        (NAMED, "label 'seq_len': a column of every row has this name; give the axis"),
    ],
)
def test_a_file_that_is_no_sweep_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    assert main([f"--config={path}"]) == 2
    assert message in capsys.readouterr().err
    assert main([f"--config={tmp_path}/wrogn.py"]) == 2
    assert "no such file; did you mean" in capsys.readouterr().err


def test_ray_is_asked_for_by_name_where_it_is_missing(sweep, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep("--engine=ray") == 2
    assert "Ray is not installed; pip install -e '.[ray]'" in capsys.readouterr().err


SWEEPS = sorted(p for p in (ROOT / "configs" / "sweeps").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_of_ours_makes_legal_points(path):
    found = points(read_sweep(path))
    assert found
    assert f"--config={path.relative_to(ROOT).as_posix()}" in path.read_text()


@pytest.mark.slow  # a cluster starts, and half of it is killed
def test_ray_runs_every_point_once_though_a_node_dies(sweep, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")

    monkeypatch.setenv("FAKE", "wait a little")
    with two_nodes(kill_after=3.0) as address:
        assert sweep("--engine=ray", f"--address={address}") == 0
    assert len({row["fingerprint"] for row in rows(tmp_path)}) == 4
    assert len(rows(tmp_path)) == 4
