"""Train the small configs, a few seeds each, and compare them: the README's table.

Each run is a row of ``results/comparison.csv``; runs that are there already, by the
fingerprint of their config, are not run again.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections import defaultdict
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from sparsejax.bench.runs import completed, fingerprint_of, trained
from sparsejax.bench.table import markdown, result
from sparsejax.train.metrics import read_metrics
from sparsejax.train.plots import write_figure

CONFIGS = (
    *("dense", "block_attention", "moe", "memory", "memory_plus", "peer", "fff"),
    *("masked", "quickstart"),
)
KEPT = {
    "eval/bits_per_byte": "bits_per_byte",
    "eval/loss": "eval_loss",
    "parameters_total": "parameters_total",
    "parameters_active": "parameters_active",
    "parameters_nonzero": "parameters_nonzero",
    "useful_flops_per_token": "useful_flops_per_token",
    "attention_density": "attention_density",
    "peak_memory_bytes": "peak_memory_bytes",
}
COLUMNS = {
    "config": "config",
    "bits": "bits per byte",
    "total": "parameters",
    "nonzero": "non-zero",
    "active": "active",
    "flops": "useful MFLOPs a token",
}


def run(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train one config with one seed in a process of its own; give its row."""
    with trained(name, seed, overrides) as workdir:
        summary = json.loads((workdir / "summary.json").read_text())
        steps = read_metrics(workdir)[-1]["step"]
    row = {"config": name, "seed": seed, "steps": steps}
    return row | {new: summary[old] for old, new in KEPT.items()}


def table(rows: list[dict[str, str]]) -> str:
    """Summarise the rows: mean and range over seeds, in Markdown."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["config"]].append(row)
    lines = []
    for name, group in groups.items():
        bits = [float(row["bits_per_byte"]) for row in group]
        first = group[0]
        lines.append(
            {
                "config": f"`{name}`",
                "bits": f"{statistics.mean(bits):.3f}"
                f" ({min(bits):.3f} to {max(bits):.3f})",
                "total": f"{int(first['parameters_total']):,}",
                "nonzero": f"{int(first['parameters_nonzero']):,}",
                "active": f"{int(first['parameters_active']):,}",
                "flops": f"{int(first['useful_flops_per_token']) / 1e6:.2f}",
            }
        )
    return markdown(lines, COLUMNS)


def frontier(axes: Axes, rows: list[dict[str, str]]) -> Axes:
    """Draw held-out loss against useful FLOPs; bars span the seeds, marks are means.

    The dotted line is the dense model's mean.
    """
    groups = defaultdict(list)
    for row in rows:
        flops = float(row["useful_flops_per_token"]) / 1e6
        groups[row["config"], flops].append(float(row["bits_per_byte"]))
    for ((name, flops), bits), mark in zip(
        groups.items(), itertools.cycle("os^DvP<X>"), strict=False
    ):
        mean = statistics.mean(bits)
        error = [[mean - min(bits)], [max(bits) - mean]]
        axes.errorbar([flops], [mean], error, fmt=mark, capsize=4, label=name)
        if name == CONFIGS[0]:
            axes.axhline(mean, color="#333333", linewidth=0.8, linestyle=":")
    axes.legend(ncols=2, loc="upper left")
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("useful FLOPs of a training step, a token (millions)")
    axes.set_ylabel("held-out bits per byte")
    return axes


def main(argv: list[str]) -> int:
    """Run what is missing, print the table and draw its picture."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench comparison")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    flags, overrides = parser.parse_known_args(argv)
    wanted = {
        fingerprint_of(name, seed, overrides): partial(run, name, seed, overrides)
        for seed in range(flags.seeds)
        for name in flags.configs
    }
    rows = completed("comparison", wanted)
    write_figure(result("comparison.png"), partial(frontier, rows=rows))
    sys.stdout.write(table(rows) + "\n")
    return 0
