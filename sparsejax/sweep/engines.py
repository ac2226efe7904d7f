"""Engines: where jobs run. ``(jobs, options) -> iterator of (job, row or error)``.

Whatever the engine, a job's row is yielded as soon as it is there, each job exactly
once, and an error ends one job only.
"""

import concurrent.futures
import os
import queue
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsejax.bench.table import ROOT
from sparsejax.config import ConfigError
from sparsejax.sweep.jobs import Job, JobError, run_job

__all__ = ["ENGINES", "Options", "local", "ray", "write_slurm"]

Ended = tuple[Job, dict[str, Any] | JobError]


class Options(NamedTuple):
    """How an engine spreads its jobs."""

    workers: int = 1  # at a time
    devices: tuple[str, ...] = ()  # ids; each worker sees one of them only
    address: str | None = None  # of a Ray cluster; None for this machine
    cpus: float = 1  # that a Ray job asks for
    gpus: float = 0


def local(jobs: Sequence[Job], options: Options) -> Iterator[Ended]:
    """Run jobs in processes of this machine, as many at a time as there are workers."""
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for number in range(options.workers):
        slots.put(_seen(options.devices, number))

    def work(job: Job) -> dict[str, Any]:
        slot = slots.get()
        try:
            return run_job(job, slot)
        finally:
            slots.put(slot)

    pool = concurrent.futures.ThreadPoolExecutor(options.workers)
    try:
        ends = {pool.submit(work, job): job for job in jobs}
        for end in concurrent.futures.as_completed(ends):
            yield ends[end], _outcome(end)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _seen(devices: tuple[str, ...], number: int) -> dict[str, str]:
    if not devices:
        return {}
    mine = devices[number % len(devices)]
    return dict.fromkeys(("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"), mine)


def _outcome(end: concurrent.futures.Future) -> dict[str, Any] | JobError:
    error = end.exception()
    if error is None:
        return end.result()
    return error if isinstance(error, JobError) else JobError(f"{error!r}")


def ray(jobs: Sequence[Job], options: Options) -> Iterator[Ended]:
    """Run jobs on a Ray cluster whose machines share the run folder.

    A machine that dies takes no finished point with it: its other jobs start again
    elsewhere, from their checkpoints.

    Raises:
        ConfigError: if Ray is not installed.
    """
    try:
        import ray as cluster  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "--engine=ray: Ray is not installed; pip install -e '.[ray]'"
        ) from None
    cluster.init(address=options.address, log_to_driver=False, ignore_reinit_error=True)
    remote = cluster.remote(
        num_cpus=options.cpus, num_gpus=options.gpus, max_retries=-1
    )(run_job)
    waiting = {remote.remote(job): job for job in jobs}
    try:
        while waiting:
            ready, _ = cluster.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready[0])
            try:
                yield job, cluster.get(ready[0])
            except (JobError, cluster.exceptions.RayError) as error:
                cause = getattr(error, "cause", None) or error
                yield job, JobError(str(cause))
    finally:
        cluster.shutdown()


def write_slurm(jobs: Sequence[Job], folder: Path, flags: Sequence[str]) -> Path:
    """Write an array script that runs one job a task; nothing is submitted.

    Rows are collected by running the sweep again with ``--collect``.

    Args:
        jobs: to be run.
        folder: for the script and the logs.
        flags: that make ``sweep.py`` find the same points.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    chosen = folder / "points.txt"
    chosen.write_text("".join(f"{job.point.fingerprint}\n" for job in jobs))
    command = shlex.join([sys.executable, "sweep.py", *flags])
    line = f'sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(chosen))}'
    script = folder / "array.sh"
    script.write_text(
        "\n".join(
            (
                "#!/bin/bash",
                "# sbatch this file; add --partition, --gres, --time as needed.",
                f"#SBATCH --job-name=sweep-{folder.name}",
                f"#SBATCH --array=1-{len(jobs)}",
                f"#SBATCH --output={folder}/logs/%a.txt",
                "#SBATCH --requeue",
                "set -euo pipefail",
                f"cd {shlex.quote(str(ROOT))}",
                f"point=$({line})",
                f'exec {command} --only="$point" --keep',
                "",
            )
        )
    )
    os.chmod(script, 0o755)
    return script


ENGINES = {"local": local, "ray": ray}
