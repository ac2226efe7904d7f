"""Every method of ``configs/masked.py``, trained for a moment at a small size.

    python -m sparsejax.bench methods

Not a comparison: methods differ in density, and a hundred steps are no training. It
shows that each runs to its end and what it then looks like. Methods for weights that
are trained already begin with those of a dense run of as many steps. A run is a row of
``results/methods.csv``; runs that are there already, by the fingerprint of their
config, are not run again. Flags ``--config.…`` go to every run.
"""

import argparse
import contextlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsejax.bench.runs import completed, continued, fingerprint_of, trained
from sparsejax.bench.table import ROOT, markdown
from sparsejax.train.metrics import read_metrics

SMALL = (
    "--config.model.depth=2",
    "--config.data.seq_len=128",
    "--config.data.batch_size=4",
    "--config.train.eval_every=100",
    "--config.train.eval_batches=8",
    "--config.train.save_every=100",
)
DENSE = "dense"  # whose weights some begin with
COLUMNS = {
    "method": "method",
    "start": "begins with",
    "loss": "training loss at the end",
    "eval_loss": "held-out loss",
    "density": "density of masks",
    "nonzero": "non-zero parameters",
}


def _of_config(name: str) -> Any:
    return runpy.run_path(str(ROOT / "configs" / "masked.py"))[name]


def methods() -> list[str]:
    """Name every method that the config file has."""
    return [*_of_config("METHODS")]


def wanted(method: str, more: list[str]) -> tuple[str, Callable[[], dict[str, Any]]]:
    """Give the fingerprint of a method's run, and what makes its row."""
    flags = [*SMALL, *more]
    mark = fingerprint_of(f"masked:{method}", 0, flags)
    if method not in _of_config("TRAINED"):
        return mark, partial(_row, method, "", trained(f"masked:{method}", 0, flags))
    mark += f"-from-{fingerprint_of(DENSE, 0, flags)}"
    return mark, partial(_row, method, DENSE, _pruned(method, flags))


@contextlib.contextmanager
def _pruned(method: str, flags: list[str]) -> Iterator[Path]:
    """Train a dense run, then on from its weights with a method."""
    plan = _of_config("METHODS")[method]
    masks = [f"--config.masked.{name}={value}" for name, value in plan.items()]
    with trained(DENSE, 0, flags) as before, continued(before, masks) as workdir:
        yield workdir


def _row(method: str, start: str, run: Any) -> dict[str, Any]:
    """Train in a process of its own; sum the run up."""
    with run as workdir:
        summary = json.loads((workdir / "summary.json").read_text())
        last = read_metrics(workdir)[-1]
    row = {"method": method, "start": start, "steps": last["step"]}
    row |= {"loss": round(last["loss"], 4), "eval_loss": round(summary["eval/loss"], 4)}
    row |= {"density": round(last["masked/density"], 4)}
    return row | {"nonzero": summary["parameters_nonzero"]}


def main(argv: list[str]) -> int:
    """Run what is missing; print the table of all there is."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench methods")
    names = methods()
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    flags, more = parser.parse_known_args(argv)
    runs = dict(wanted(method, more) for method in flags.methods)
    sys.stdout.write(markdown(completed("methods", runs), COLUMNS) + "\n")
    return 0
