"""Every method of ``configs/masked.py``, trained for a moment at a small size.

    python -m sparsejax.bench methods

Not a comparison: methods differ in density, and a hundred steps are no training. It
shows that each runs to its end and what it then looks like. A run is a row of
``results/methods.csv``; runs that are there already, by the fingerprint of their
config, are not run again. Flags ``--config.…`` go to every run.
"""

import argparse
import json
import runpy
import sys
from functools import partial
from typing import Any

from sparsejax.bench.runs import completed, fingerprint_of, trained
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
COLUMNS = {
    "method": "method",
    "loss": "training loss at the end",
    "eval_loss": "held-out loss",
    "density": "density of masks",
    "nonzero": "non-zero parameters",
}


def methods() -> list[str]:
    """Name every method that the config file has."""
    return [*runpy.run_path(str(ROOT / "configs" / "masked.py"))["METHODS"]]


def run(method: str, more: list[str]) -> dict[str, Any]:
    """Train with one method in a process of its own; give its row."""
    flags = [*SMALL, *more]
    with trained(f"masked:{method}", 0, flags) as workdir:
        summary = json.loads((workdir / "summary.json").read_text())
        last = read_metrics(workdir)[-1]
    row = {"method": method, "steps": last["step"]}
    row |= {"loss": round(last["loss"], 4), "eval_loss": round(summary["eval/loss"], 4)}
    row |= {"density": round(last["masked/density"], 4)}
    return row | {"nonzero": summary["parameters_nonzero"]}


def main(argv: list[str]) -> int:
    """Run what is missing; print the table of all there is."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench methods")
    names = methods()
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    flags, more = parser.parse_known_args(argv)
    wanted = {
        fingerprint_of(f"masked:{method}", 0, [*SMALL, *more]): partial(
            run, method, more
        )
        for method in flags.methods
    }
    sys.stdout.write(markdown(completed("methods", wanted), COLUMNS) + "\n")
    return 0
