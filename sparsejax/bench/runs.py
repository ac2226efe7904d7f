"""Studies: runs of whole configs, each in a process of its own; rows that are kept."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsejax.bench.table import ROOT, provenance, read_rows, write_rows
from sparsejax.config import convert, fingerprint, override, read
from sparsejax.train.config import Config

__all__ = ["completed", "continued", "fingerprint_of", "trained"]


@contextlib.contextmanager
def trained(name: str, seed: int, overrides: Sequence[str]) -> Iterator[Path]:
    """Train a config with a seed; give the run's workdir, which is removed after."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        flags = [f"--workdir={workdir}", f"--config.seed={seed}", *overrides]
        _python("train.py", f"--config={_path(name)}", *flags)
        yield workdir


@contextlib.contextmanager
def continued(before: Path, overrides: Sequence[str]) -> Iterator[Path]:
    """Train on with a run's weights, its config changed; give the new workdir."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        flags = [f"--workdir={before}", f"--out={workdir}", *overrides]
        _python("-m", "sparsejax.convert", "finetune", *flags)
        _python("train.py", f"--config={workdir}/config.json", f"--workdir={workdir}")
        yield workdir


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def _path(name: str) -> str:
    """Give a config's file; ``masked:rigl`` is one of several in one."""
    file, *method = name.split(":")
    return ":".join([f"configs/{file}.py", *method])


def fingerprint_of(name: str, seed: int, overrides: Sequence[str]) -> str:
    """Fingerprint the config that a run will have."""
    values = read(ROOT / _path(name))
    for flag in [f"--config.seed={seed}", *overrides]:
        path, _, text = flag.removeprefix("--config.").partition("=")
        override(Config, values, path, text)
    return fingerprint(convert(Config, values))


def completed(
    name: str, wanted: Mapping[str, Callable[[], Mapping[str, Any]]]
) -> list[dict[str, str]]:
    """Make the rows that ``results/NAME.csv`` lacks; give those that are wanted.

    A row that is there is not made again, so that a study can be made in pieces, and
    by several processes at once.

    Args:
        name: of the study.
        wanted: what makes each row, by the fingerprint of its config.
    """
    for mark, make in wanted.items():
        if mark not in {row["fingerprint"] for row in read_rows(name)}:
            row = {**make(), "fingerprint": mark, **provenance()}
            write_rows(name, [*read_rows(name), row])  # others may have written
    return [row for row in read_rows(name) if row["fingerprint"] in wanted]
