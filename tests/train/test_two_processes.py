"""Two real processes on loopback train what one process trains."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sparsejax.train.metrics import read_metrics
from tests.train import toy

ROOT = Path(__file__).parents[2]
CONFIG = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r}))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of the toy, on sixty short documents."""
    folder = tmp_path_factory.mktemp("two")
    for number in range(60):
        line = f"Document {number} says: the quick brown fox jumps over {number} dogs. "
        (folder / f"{number}.txt").write_text(line * (3 + number % 5))
    data = {"files": [str(folder / "*.txt")], "cache_dir": str(folder / "cache")}
    values = {**toy.TOY, "data": {**toy.TOY["data"], **data}}
    values["train"] = {"steps": 12, "log_every": 1, "eval_every": 12, "save_every": 4}
    values["train"] |= {"eval_batches": 1, "sample_tokens": 4}
    values["masked"] = {"density": 0.5, "begin": 2, "end": 6, "every": 2}
    values["mesh"] = {"data": -1, "expert": 2}
    path = folder / "toy.py"
    path.write_text(CONFIG.format(text=json.dumps(values)))
    return path


def launch(config, workdir, *, count, port=0):
    """Start all processes of a run, eight devices between them."""
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(8 // count),
        "JAX_PLATFORMS": "cpu",
        "SPARSEJAX_HEARTBEAT_SECONDS": "10",
    }
    flags = [f"--config={config}", f"--workdir={workdir}"]
    if count > 1:
        flags += [f"--coordinator=localhost:{port}", f"--processes={count}"]
    return [
        subprocess.Popen(
            [sys.executable, "train.py", *flags]
            + ([f"--process_id={index}"] if count > 1 else []),
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def finish(processes):
    """Wait; (exit status, last line on stderr) of each."""
    said = [process.communicate(timeout=280)[1] for process in processes]
    lines = [text.strip().splitlines()[-1] if text.strip() else "" for text in said]
    return [(p.returncode, line) for p, line in zip(processes, lines, strict=True)]


def figures(workdir):
    rows = read_metrics(workdir)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_two_processes_train_alike_and_resume_exactly(config, tmp_path):
    alone, whole, killed = (tmp_path / name for name in ("alone", "whole", "killed"))
    assert finish(launch(config, alone, count=1))[0][0] == 0
    both = finish(launch(config, whole, count=2, port=free_port()))
    assert [status for status, _ in both] == [0, 0], both
    one, two = (
        [row["loss"] for row in read_metrics(folder)] for folder in (alone, whole)
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=2e-6)

    processes = launch(config, killed, count=2, port=free_port())
    record = killed / "metrics.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if record.exists() and record.read_text().count("\n") >= 6:
            break
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    (status, line), _ = finish(processes)
    assert status != 0
    assert "process" in line, line
    again = finish(launch(config, killed, count=2, port=free_port()))
    assert [status for status, _ in again] == [0, 0], again
    assert figures(killed) == figures(whole)
