"""One point, run in a process of its own; every engine calls ``run_job``.

A job's home is a folder named after the point's fingerprint. It holds the config as a
file that ``train.py`` takes, so that any point can be run again by hand, the run's own
files, ``log.txt``, and at the end ``row.json``, which appears whole: a point that has
it is finished, whoever has died since.
"""

import json
import os
import pprint
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsejax.bench.table import ROOT
from sparsejax.sweep.grid import Point
from sparsejax.sweep.record import COLUMNS, read_row
from sparsejax.train.workdir import write_atomically

__all__ = ["Job", "JobError", "finished_row", "run_job", "write_home"]

ENTRY = (sys.executable, "train.py")


class JobError(RuntimeError):
    """A point's run failed; the message is meant for the user."""


class Job(NamedTuple):
    """A point, where it lives, and the command that runs it."""

    point: Point
    home: Path
    entry: tuple[str, ...] = ENTRY
    retries: int = 1


def write_home(job: Job) -> list[str]:
    """Write the config that the point is run by; give the whole command."""
    job.home.mkdir(parents=True, exist_ok=True)
    text = (
        f'"""A point of a sweep: {job.point.labels}."""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n"
        f"    return ConfigDict({pprint.pformat(job.point.values, sort_dicts=False)})\n"
    )
    write_atomically(job.home / "config.py", text)
    return [*job.entry, f"--config={job.home}/config.py", f"--workdir={job.home}"]


def finished_row(job: Job) -> dict[str, Any] | None:
    """Give the row of a point that has been run, wherever it was; None if it was not.

    A run that ended while nobody was left to read it is read now.
    """
    path = job.home / "row.json"
    if path.exists():
        row = json.loads(path.read_text())
        right = row.get("fingerprint") == job.point.fingerprint
        return row if right and tuple(row) == COLUMNS else None
    if not (job.home / "summary.json").exists():
        return None
    try:
        return _read(job)
    except ValueError:
        return None


def run_job(job: Job, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a point to its end, resuming what is there; give its row.

    Raises:
        JobError: if it failed once more often than it may be retried.
    """
    row = finished_row(job)
    command = write_home(job)
    if row is not None:
        return row
    for attempt in range(job.retries + 1):
        code = _run(command, job.home / "log.txt", environment or {})
        # A run that was asked to stop has saved, ended well, and is not finished.
        row = finished_row(job) if code == 0 else None
        if row is not None:
            return row
        # A config that cannot be run stays so, and an interrupt is meant for all.
        in_vain = code in (2, 130, -signal.SIGINT)
        if attempt == job.retries or in_vain:
            raise JobError(f"{job.point.labels}: {_told(job.home, code)}")
    raise AssertionError("every attempt returns or raises")


def _read(job: Job) -> dict[str, Any]:
    row = read_row(job.home, job.point)
    write_atomically(job.home / "row.json", json.dumps(row))
    return row


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)  # it saves, and ends
            process.wait()
            raise


def _told(home: Path, code: int) -> str:
    lines = (home / "log.txt").read_text(errors="replace").split("\n")
    said = " / ".join(line.strip() for line in lines if line.strip()[:1])
    how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    return f"{how}; {home}/log.txt ends: …{said[-300:]}"
