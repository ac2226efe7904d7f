"""How much decay 2:4 pre-training takes: flips of masks against those of a dense run.

    python -m sparsejax.bench flips

A dense run is followed by masks that it never applies. The flip rate of a run under
masks, over the dense run's, is the factor that Hu et al. 2024 (arXiv:2404.01847) choose
a strength of decay by: between 0.60 and 0.95 masks settle and still move. They look at
the beginning of a run, this at all of its masks. A run is a row of
``results/flips.csv``; runs that are there already, by the fingerprint of their config,
are not run again. Flags ``--config.…`` go to every run.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparsejax.bench.methods import SMALL
from sparsejax.bench.runs import completed, fingerprint_of, trained
from sparsejax.bench.table import markdown
from sparsejax.train.metrics import read_metrics

NAME = "masked:two_of_four"
EVERY, END = 10, 90
OFTEN = (
    f"--config.masked.every={EVERY}",
    f"--config.masked.end={END}",
    "--config.masked.dense_from=none",
)
# Masked weights count for all of theirs until the end: masks only look on.
LOOKING_ON = (
    "--config.masked.estimator=exponential_mask_decay",
    "--config.masked.estimator_arguments={'rate': 0.0}",
)
DECAYS = (0.0, 2e-4, 2e-2)
DENSE = "dense"  # in the place of a decay
COLUMNS = {
    "decay": "decay",
    "flips": "weights that flip at a change of masks, %",
    "factor": "over the dense run's",
    "eval_loss": "held-out loss",
}


def flips(lines: Iterable[Mapping[str, Any]]) -> float:
    """Average the share of weights that flip when masks change, from a run's lines."""
    rates = [x["masked/flip_rate"] for x in lines if x["step"] <= END + 1]
    return statistics.mean(rates) * EVERY


def factors(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Divide what flips by what flips in the dense run."""
    rows = list(rows)
    dense = [float(row["flips"]) for row in rows if row["decay"] == DENSE]
    found = []
    for row in rows:
        factor = f"{float(row['flips']) / dense[0]:.2f}" if dense else ""
        share = f"{100 * float(row['flips']):.2f}"
        found.append({**row, "flips": share, "factor": factor})
    return found


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Lay the factors out."""
    return markdown(factors(rows), COLUMNS)


def run(decay: str, overrides: list[str]) -> dict[str, Any]:
    """Train in a process of its own; give its row."""
    with trained(NAME, 0, overrides) as workdir:
        lines = read_metrics(workdir)
    row = {"decay": decay, "flips": round(flips(lines), 6)}
    return row | {"eval_loss": round(lines[-1]["eval/loss"], 4)}


def main(argv: list[str]) -> int:
    """Run what is missing; print the table of all there is."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench flips")
    _, more = parser.parse_known_args(argv)
    runs = {DENSE: [*SMALL, *OFTEN, *LOOKING_ON, *more]}
    for decay in DECAYS:
        strength = f"--config.masked.estimator_arguments.decay={decay}"
        runs[str(decay)] = [*SMALL, *OFTEN, strength, *more]
    wanted = {
        fingerprint_of(NAME, 0, flags): partial(run, name, flags)
        for name, flags in runs.items()
    }
    sys.stdout.write(table(completed("flips", wanted)) + "\n")
    return 0
