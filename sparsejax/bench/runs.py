"""Runs of whole configs that a study is made of: each in a process of its own."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsejax.bench.table import ROOT
from sparsejax.config import convert, fingerprint, override, read
from sparsejax.train.config import Config

__all__ = ["fingerprint_of", "trained"]


@contextlib.contextmanager
def trained(name: str, seed: int, overrides: Sequence[str]) -> Iterator[Path]:
    """Train a config with a seed; give the run's workdir, which is removed after."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "train.py", f"--config={_path(name)}"]
        command += [f"--workdir={workdir}", f"--config.seed={seed}", *overrides]
        subprocess.run(command, cwd=ROOT, check=True)
        yield workdir


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
