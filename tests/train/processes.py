"""Runs of ``train.py`` as a user starts them, in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from sparsejax.train.metrics import read_metrics
from tests.train import toy

ROOT = Path(__file__).parents[2]
PATIENCE = 1200  # seconds: a busy machine is slow, and only a run that hangs is wrong
CONFIG = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r}))
"""


def write_config(folder, **train):
    """Write a config file of the toy on sixty documents; ``train`` changes it."""
    for number in range(60):
        line = f"Document {number} says: the quick brown fox jumps over {number} dogs. "
        (folder / f"{number}.txt").write_text(line * (3 + number % 5))
    data = {"files": [str(folder / "*.txt")], "cache_dir": str(folder / "cache")}
    values = {**toy.TOY, "data": {**toy.TOY["data"], **data}}
    values["train"] = {"steps": 12, "log_every": 1, "eval_every": 12, "save_every": 4}
    values["train"] |= {"eval_batches": 1, "sample_tokens": 4, **train}
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
        "SPARSEJAX_HEARTBEAT_SECONDS": "20",
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


def wait_for_lines(record, count, processes):
    """Wait until a run's record has as many lines; fail if it ends or hangs before."""
    until = time.monotonic() + PATIENCE
    while not record.exists() or record.read_text().count("\n") < count:
        ended = [process.poll() for process in processes]
        assert not any(status is not None for status in ended), finish(processes)
        assert time.monotonic() < until, f"{record} has no line {count}"
        time.sleep(0.01)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def finish(processes):
    """Wait; (exit status, last line on stderr) of each."""
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    lines = [text.strip().splitlines()[-1] if text.strip() else "" for text in said]
    return [(p.returncode, line) for p, line in zip(processes, lines, strict=True)]


def figures(workdir):
    rows = read_metrics(workdir)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
