"""The command line of ``sweep.py``: list a sweep's points, run what is missing.

    python sweep.py --config=configs/sweeps/frontier.py --list
    python sweep.py --config=configs/sweeps/frontier.py --workers=2
    python sweep.py --config=configs/sweeps/frontier.py --engine=slurm

Points that have a row in ``results/NAME.csv`` are not run again; a run that was cut off
resumes from its checkpoint, in ``runs/sweeps/NAME/FINGERPRINT``.
"""

import argparse
import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsejax.bench.table import RESULTS, ROOT
from sparsejax.config import ConfigError, near, run
from sparsejax.sweep.engines import ENGINES, Options, write_slurm
from sparsejax.sweep.grid import Point, Sweep, planned_cost, points
from sparsejax.sweep.jobs import ENTRY, Job, JobError, finished_row
from sparsejax.sweep.progress import Board, listing
from sparsejax.sweep.record import COLUMNS, Results

__all__ = ["main", "read_sweep"]


def parser() -> argparse.ArgumentParser:
    """Describe the flags."""
    flags = argparse.ArgumentParser(prog="sweep.py", allow_abbrev=False)
    flags.add_argument("--config", required=True, help="a file with get_sweep()")
    flags.add_argument("--list", action="store_true", help="show the points, run none")
    flags.add_argument("--collect", action="store_true", help="only gather rows")
    flags.add_argument("--engine", default="local", help="local, ray or slurm")
    flags.add_argument("--address", help="of a Ray cluster")
    flags.add_argument("--workers", type=int, help="local runs at a time (default 1)")
    flags.add_argument("--devices", help="ids such as 0,1: one for each worker")
    flags.add_argument("--retries", type=int, default=1, help="of a run that failed")
    flags.add_argument("--only", help="fingerprint of the one point to run")
    flags.add_argument("--keep", action="store_true", help="leave results/ alone")
    flags.add_argument("--runs", default="runs/sweeps", help="where runs live")
    flags.add_argument("--results", default=str(RESULTS), help="where tables live")
    return flags


def read_sweep(path: str | Path) -> Sweep:
    """Run ``get_sweep()`` of a file.

    Raises:
        ConfigError: if there is no such file, it fails, or it returns something else.
    """
    sweep = run(path, lambda module: module.get_sweep())
    if not isinstance(sweep, Sweep):
        raise ConfigError(f"--config={path}: get_sweep() must return a Sweep")
    return sweep


def main(argv: list[str] | None = None, *, entry: tuple[str, ...] = ENTRY) -> int:
    """Run; 0 if every point has its row, 1 if some failed, 2 if it could not begin.

    It is 130 after Ctrl-C.
    """
    flags = parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return _main(flags, entry)
    except (ConfigError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(
            f"error: {error.filename}: cannot be written ({error.strerror or error});"
            " see to it and start the same command again: what has finished is kept\n"
        )
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(
            "interrupted; start the same command again: finished points are skipped,"
            " and those that ran go on from their checkpoints\n"
        )
        return 130


def _main(flags: argparse.Namespace, entry: tuple[str, ...]) -> int:
    if flags.retries < 0:
        raise ConfigError(f"--retries={flags.retries}: must not be negative")
    name = Path(flags.config).stem
    wanted = _chosen(_named(points(read_sweep(flags.config))), flags.only)
    results = Results(Path(flags.results) / f"{name}.csv")
    if flags.list:
        costs = [planned_cost(point.values) for point in wanted]
        done = [results.has(point.fingerprint) for point in wanted]
        listing(wanted, costs, done)
        return 0
    if not flags.keep:
        results.check()
    home = (ROOT / flags.runs / name).resolve()
    jobs = [Job(p, home / p.fingerprint, entry, flags.retries) for p in wanted]
    # A task of an array leaves the table to whoever collects.
    with contextlib.nullcontext() if flags.keep else _alone(home):
        for job in jobs:
            row = finished_row(job)
            if row is not None and not flags.keep:
                results.append(row)
        left = [job for job in jobs if not results.has(job.point.fingerprint)]
        if flags.engine == "slurm" and left:
            script = write_slurm(left, home, _again(flags))
            sys.stdout.write(f"{len(left)} points: sbatch {script}\n")
            return 0
        if not flags.collect:
            return _run(left, len(jobs), results, flags)
    sys.stdout.write(f"{len(jobs) - len(left)} of {len(jobs)} points have rows\n")
    return 0


def _run(
    left: list[Job], total: int, results: Results, flags: argparse.Namespace
) -> int:
    if flags.engine not in ENGINES:
        raise ConfigError(
            f"--engine={flags.engine}: no such engine{near(flags.engine, ENGINES)}"
        )
    failed = 0
    with Board(total, total - len(left)) as board:
        began = time.monotonic()
        for job, row in ENGINES[flags.engine](left, _options(flags)):
            if isinstance(row, JobError):
                failed += 1
                board.failed(job.point, str(row))
            else:
                if not flags.keep:
                    results.append(row)
                board.finished(job.point, row, time.monotonic() - began)
    return 1 if failed else 0


def _options(flags: argparse.Namespace) -> Options:
    devices = () if flags.devices is None else tuple(flags.devices.split(","))
    if not all(devices):
        raise ConfigError(f"--devices={flags.devices}: must be ids, such as 0,1")
    workers = max(1, len(devices)) if flags.workers is None else flags.workers
    limit = len(devices) or os.cpu_count() or 1
    if not 1 <= workers <= limit:
        what = "devices" if devices else "cores"
        raise ConfigError(f"--workers={workers}: must be in 1..{limit}, the {what}")
    return Options(workers, devices, flags.address)


def _again(flags: argparse.Namespace) -> list[str]:
    config = Path(flags.config).resolve()
    return [
        f"--config={config}",
        f"--runs={flags.runs}",
        f"--results={Path(flags.results).resolve()}",
        f"--retries={flags.retries}",
    ]


def _named(every: list[Point]) -> list[Point]:
    """Refuse labels that ``read_table`` could not tell from a row's own columns."""
    for point in every:
        if twice := point.labels.keys() & {*COLUMNS}:
            raise ConfigError(
                f"label {min(twice)!r}: a column of every row has this name; give the"
                " axis another, label=…"
            )
    return every


def _chosen(every: list[Point], only: str | None) -> list[Point]:
    if only is None:
        return every
    found = [point for point in every if point.fingerprint == only]
    if not found:
        known = [point.fingerprint for point in every]
        raise ConfigError(f"--only={only}: no such point{near(only, known)}")
    return found


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[Any]:
    """Keep a second command from running the same sweep."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{home}: another command is running this sweep; wait for it"
            ) from None
        yield
