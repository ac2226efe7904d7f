"""Laws of the frontier's rows: fitted, resampled, and asked for runs they never saw.

    python -m sparsejax.bench frontier

Nothing trains: ``results/frontier.csv`` and ``results/frontier_next.csv`` are what
``sweep.py`` made of the two configs of those names. Coefficients and errors go to
``results/frontier_fits.csv``, what was expected of the larger runs beside what they
gave to ``results/frontier_predicted.csv``.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparsejax.bench.table import markdown, provenance, read_rows, write_rows
from sparsejax.scaling import LAWS, Fit, fit

# What of the joint law these runs can tell: size, data and routing.
HELD = {"fine": 0, "gamma": 1, "masked": 0, "mu": 1, "context": 0, "reading": 0}
HELD |= {"first": 1, "last_inverse": 0, "shape": 1}
RESAMPLED = 10
BASE = "dense"

FITS = {"law": "law", "what": "what", "value": "value", "between": "95 % of refits"}
PREDICTED = ("kind", "law", "expected", "measured", "error")


def columns(rows: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Give a sweep's columns the names that laws read them by."""

    def numbers(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    return {
        "average": numbers("parameters_average"),
        "active": numbers("parameters_active"),
        "total": numbers("parameters_total"),
        "density": np.ones(len(rows)),
        "attention": numbers("attention_density"),
        "length": numbers("seq_len"),
        "kind": np.array([json.loads(row["labels"])["kind"] for row in rows]),
        **{name: numbers(name) for name in ("tokens", "granularity", "loss")},
    }


def rows_of(
    table: Mapping[str, np.ndarray], where: np.ndarray
) -> dict[str, np.ndarray]:
    """Keep some rows of every column."""
    return {name: column[where] for name, column in table.items()}


def is_masked(table: Mapping[str, np.ndarray]) -> np.ndarray:
    """Say which rows are of masked models."""
    return np.char.endswith(table["kind"], "masked")


def fits(table: Mapping[str, np.ndarray]) -> dict[str, Fit]:
    """Fit averages to the dense runs, and the joint law to dense and routed ones.

    The masked runs are held out of the first, the memory of the second.
    """
    plain = rows_of(table, (table["kind"] == BASE) | is_masked(table))
    wide = rows_of(table, ~is_masked(table))
    return {
        "average_parameters": fit(
            LAWS["average_parameters"],
            plain,
            held_out=plain["kind"] != BASE,
            starts=6,
            bootstrap=RESAMPLED,
        ),
        "joint": fit(
            LAWS["joint"],
            wide,
            fixed=HELD,
            held_out=wide["kind"] == "memory",
            starts=6,
            bootstrap=RESAMPLED,
        ),
    }


def described(
    found: Mapping[str, Fit], table: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Give a row for each coefficient, and for each kind's mean error with its sign."""
    for law, one in found.items():
        for name in one.intervals:
            low, high = one.intervals[name]
            value = one.coefficients[name]
            yield {"law": law, "what": name, "value": value, "low": low, "high": high}
        yield {"law": law, "what": "error of the rows fitted", "value": one.error}
        averages = law == "average_parameters"
        held = is_masked(table) if averages else table["kind"] == "memory"
        for kind in dict.fromkeys(table["kind"][held].tolist()):
            own = rows_of(table, table["kind"] == kind)
            error = float(np.log(own["loss"] / one.predict(own)).mean())
            yield {"law": law, "what": f"mean error, {kind}, unseen", "value": error}


def predicted(
    found: Mapping[str, Fit], larger: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Give what was expected of each larger run, and what it gave."""
    expectations = {law: one.predict(larger) for law, one in found.items()}
    lines = []
    for index, kind in enumerate(larger["kind"].tolist()):
        law = "joint" if kind.endswith("experts") else "average_parameters"
        expected = float(expectations[law][index])
        measured = float(larger["loss"][index])
        error = measured / expected - 1
        line = {"kind": kind, "law": law, "expected": expected, "measured": measured}
        lines.append(line | {"error": error})
    return lines


def losses(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay out the loss at the largest budget: a kind a line, widths side by side."""
    labels = [json.loads(row["labels"]) for row in rows]
    most = max(label["budget"] for label in labels)
    lines: dict[str, dict[str, str]] = {}
    for row, label in zip(rows, labels, strict=True):
        if label["budget"] == most:
            line = lines.setdefault(label["kind"], {"kind": label["kind"]})
            line[label["size"]] = f"{float(row['loss']):.3f}"
    sizes = dict.fromkeys(label["size"] for label in labels)
    heads = {"kind": "kind", **{size: f"width {size}" for size in sizes}}
    return markdown([*lines.values()], heads)


def fits_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out coefficients with their intervals, and errors in per cent."""
    lines = []
    for row in rows:
        value, between = float(row["value"]), ""
        if row.get("low"):
            between = f"{float(row['low']):.3g} to {float(row['high']):.3g}"
        shown = f"{value:.2%}" if "error" in row["what"] else f"{value:.3g}"
        lines.append({**row, "value": shown, "between": between})
    return markdown(lines, FITS)


def predicted_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out what was expected beside what was measured."""
    lines = [
        {
            **row,
            "law": f"`{row['law']}`",
            "expected": f"{float(row['expected']):.3f}",
            "measured": f"{float(row['measured']):.3f}",
            "error": f"{float(row['error']):+.1%}",
        }
        for row in rows
    ]
    return markdown(lines, {name: name for name in PREDICTED})


def main(argv: list[str]) -> int:
    """Fit, predict, write both files, and print them."""
    argparse.ArgumentParser(prog="python -m sparsejax.bench frontier").parse_args(argv)
    table = columns(read_rows("frontier"))
    found = fits(table)
    fitted = [row | provenance() for row in described(found, table)]
    larger = columns(read_rows("frontier_next"))
    expected = [row | provenance() for row in predicted(found, larger)]
    write_rows("frontier_fits", fitted)
    write_rows("frontier_predicted", expected)
    sys.stdout.write(f"{fits_table(fitted)}\n\n{predicted_table(expected)}\n")
    return 0
