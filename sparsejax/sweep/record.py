"""What is kept of a point: one row, read from its workdir, in ``results/NAME.csv``."""

import csv
import datetime
import errno
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.bench.table import RESULTS, commit, processor
from sparsejax.moe import MoEConfig
from sparsejax.sweep.grid import Point, planned_cost
from sparsejax.train.metrics import read_metrics

__all__ = ["COLUMNS", "Results", "read_row", "read_table"]

CURVE = 8  # evaluations of a run that its row keeps, the last among them
LATE = 5  # logged steps whose balance is averaged
COLUMNS: tuple[str, ...] = (
    "fingerprint",
    "labels",  # JSON: the names of the point's choices
    "seed",
    "loss",  # held out, at the end; nats a token
    "bits_per_byte",
    "curve",  # JSON: [tokens, held-out loss] along the run
    "tokens",
    "parameters_total",
    "parameters_active",
    "parameters_nonzero",
    "parameters_average",  # non-zero, averaged over the steps
    "density",  # of what is masked, at the end
    "density_average",  # and averaged over the steps
    "useful_flops",  # of the whole run, masks counted as they were
    "attention_density",
    "experts",
    "granularity",
    "seq_len",
    "seconds",
    "load_violation",  # excess of the fullest expert, late in the run
    "dropped",
    "commit",
    "date",
    "machine",
    "python",
    "jax",
)


def read_row(workdir: Path, point: Point) -> dict[str, Any]:
    """Read what a finished run left.

    Raises:
        ValueError: if it has not finished or has no held-out loss, or its files belong
            to another config.
    """
    try:
        card = json.loads((workdir / "config.json").read_text())
        summary = json.loads((workdir / "summary.json").read_text())
    except OSError as error:
        raise ValueError(f"{workdir}: no finished run ({error})") from None
    if "eval/loss" not in summary:
        raise ValueError(f"{workdir}: summed up without held-out loss; run it again")
    if card["fingerprint"] != point.fingerprint:
        raise ValueError(
            f"{workdir}: holds the run {card['fingerprint']}, not {point.fingerprint}"
        )
    logged = read_metrics(workdir)
    curve = [[x["tokens"], x["eval/loss"]] for x in logged if "eval/loss" in x]
    chosen = np.unique(np.linspace(len(curve) - 1, 0, CURVE).round().astype(int))
    row = {
        "fingerprint": point.fingerprint,
        "labels": json.dumps(point.labels),
        "seed": point.config.seed,
        "loss": summary["eval/loss"],
        "bits_per_byte": summary["eval/bits_per_byte"],
        "curve": json.dumps([curve[i] for i in chosen]),
        "tokens": logged[-1]["tokens"],
        "attention_density": summary["attention_density"],
        "seq_len": point.config.data.seq_len,
        "seconds": round(summary["seconds"], 1),
        "load_violation": _late(logged, "load_violation"),
        "dropped": _late(logged, "dropped"),
    }
    row |= {k: v for k, v in summary.items() if k.startswith("parameters_")}
    row |= _densities(logged, summary, point) | _experts(point)
    row |= {"commit": commit(), "date": _today(), "machine": _machine(card["device"])}
    row |= {k: card["versions"][k] for k in ("python", "jax")}
    return {name: row[name] for name in COLUMNS}


def _densities(
    logged: list[dict[str, Any]], summary: Mapping[str, Any], point: Point
) -> dict[str, Any]:
    """Average over the steps what masks leave, and the FLOPs that go with it.

    Both are straight lines in the density of each parameter, so those of the average
    densities are the averages.
    """
    tokens = logged[-1]["tokens"]
    rows = [x for x in logged if "masked/density" in x]
    if not rows:
        ends = {"density": 1.0, "density_average": 1.0}
        each = summary["useful_flops_per_token"]
        kept = summary["parameters_nonzero"]
        return ends | {"parameters_average": kept, "useful_flops": each * tokens}
    spans = np.diff([x["step"] for x in rows], prepend=0)  # since the last line

    def average(name: str) -> float:
        return float(np.average([np.mean(x[name]) for x in rows], weights=spans))

    start = "masked/density/"
    live = {x.removeprefix(start): average(x) for x in rows[-1] if x.startswith(start)}
    mean = planned_cost(point.values, live)
    return {
        "density": float(rows[-1]["masked/density"]),
        "density_average": average("masked/density"),
        "parameters_average": mean.nonzero,
        "useful_flops": mean.useful_flops * tokens,
    }


def _experts(point: Point) -> dict[str, Any]:
    ffn = point.config.model.ffn
    if not isinstance(ffn, MoEConfig):
        return {"experts": 1, "granularity": 1}
    return {"experts": ffn.experts, "granularity": ffn.per_token}


def _late(logged: list[dict[str, Any]], name: str) -> float | str:
    """Average a routing metric over layers and the last logged steps; "" if none."""
    found = [np.mean(x[f"moe/{name}"]) for x in logged if f"moe/{name}" in x]
    return float(np.mean(found[-LATE:])) if found else ""


def _machine(device: Mapping[str, Any]) -> str:
    if device["kind"] == "cpu":
        return f"{processor()}, {os.cpu_count()} cores"
    return f"{device['count']} x {device['kind']}"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


class Results:
    """``results/NAME.csv``: a row is appended whole, once, as its point finishes."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            ValueError: if the file has other columns, or a row twice.
        """
        self.path = path
        self.rows = _read(path)

    def check(self) -> None:
        """See that rows can be appended, before anything runs for hours.

        Raises:
            OSError: if they cannot.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        place = self.path if self.path.exists() else folder
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    def has(self, fingerprint: str) -> bool:
        """Say whether a point has its row."""
        return any(row["fingerprint"] == fingerprint for row in self.rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row down; one that is there already is not written again."""
        if self.has(row["fingerprint"]):
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not self.path.exists() or not self.path.stat().st_size:
            writer.writeheader()
        writer.writerow(row)
        with self.path.open("a", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self.rows.append({k: str(v) for k, v in row.items()})


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_text()
    if text and not text.endswith("\n"):  # a writer died in the middle of its row
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    reader = csv.DictReader(io.StringIO(text))
    found = tuple(reader.fieldnames or COLUMNS)
    if found != COLUMNS:
        other = sorted(set(found) ^ set(COLUMNS)) or ["their order"]
        raise ValueError(
            f"{path}: has other columns than a sweep's results ({', '.join(other)});"
            " move the file away, or give the sweep another name"
        )
    return list(reader)


def read_table(
    name: str, *, where: Mapping[str, Any] | None = None, folder: Path = RESULTS
) -> dict[str, np.ndarray]:
    """Read a sweep's results as columns: numbers where they are, labels by name.

    What a row does not have is NaN among numbers, and "" elsewhere.

    Args:
        name: of the sweep.
        where: labels, or columns, whose values the rows must have.
        folder: that holds ``NAME.csv``.

    Raises:
        ValueError: if no row is left.
    """
    rows: list[dict[str, Any]] = []
    for row in _read(folder / f"{name}.csv"):
        plain = {k: _number(v) for k, v in row.items() if k not in ("labels", "curve")}
        rows.append(plain | json.loads(row["labels"]))
    wanted = (where or {}).items()
    rows = [row for row in rows if all(row.get(k) == v for k, v in wanted)]
    if not rows:
        raise ValueError(f"{name}: no rows{f' where {where}' if where else ''}")
    names = dict.fromkeys(name for row in rows for name in row)  # in their order
    return {name: _column([row.get(name, "") for row in rows]) for name in names}


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _column(values: list[Any]) -> np.ndarray:
    known = [x for x in values if x != ""]
    if known and all(isinstance(x, int | float) for x in known):
        return np.array([math.nan if x == "" else x for x in values])
    if all(isinstance(x, str) for x in values):
        return np.array(values)
    return np.fromiter(values, object)  # lists, none, or several kinds
