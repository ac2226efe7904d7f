"""Rows of a measurement: written to ``results/``, read back, and laid out for reading.

Every row says what it is about: the commit, the machine, the versions, and, where a
config was run, its fingerprint.
"""

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
HUGE = "glibc.malloc.hugetlb=1"  # what the Makefile asks of Linux
PAGES = ", huge pages"


def provenance() -> dict[str, str]:
    """Say which code ran, and on what."""
    device = jax.devices()[0]
    machine = device.device_kind
    if device.platform == "cpu":
        machine = f"{processor()}, {os.cpu_count()} cores{pages()}"
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def pages() -> str:
    """Say so where memory comes in huge pages."""
    return PAGES if HUGE in os.environ.get("GLIBC_TUNABLES", "") else ""


def commit() -> str:
    """Give the commit, marked if the code differs from it; results are no code."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )

    name = git("rev-parse", "--short", "HEAD").stdout.strip()
    if not name:
        return "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!results").returncode
    return f"{name}-dirty" if changed else name


def processor() -> str:
    """Give the processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
    return next(names, platform.machine())


def result(file: str) -> Path:
    """Give where a file of that name lies among the results."""
    return RESULTS / file


def read_rows(name: str) -> list[dict[str, str]]:
    """Read ``results/NAME.csv``; no rows if there is no such file."""
    path = result(f"{name}.csv")
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``results/NAME.csv`` as a whole; columns in order of first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    RESULTS.mkdir(exist_ok=True)
    path = result(f"{name}.csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Lay rows out as a Markdown table; ``columns`` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join(str(row[key]) for key in columns) + " |" for row in rows
    ]
    return "\n".join(lines)
