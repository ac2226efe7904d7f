"""One small language model with every router, at equal budgets: loss, balance, TOST.

    python -m sparsejax.bench routers

All have the same parameters and, but for those that decide it themselves, the same
active parameters: two of eight experts, or one of four that are twice as wide. A router
that balances in a way of its own has no other balancing loss. Each run is a row of
``results/routers.csv``; runs that are there already, by the fingerprint of their
config, are not run again, so the study can be made in pieces.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sparsejax.bench.equivalence import tost
from sparsejax.bench.runs import completed, fingerprint_of, trained
from sparsejax.bench.table import markdown
from sparsejax.train.metrics import read_metrics

FFN = "--config.model.ffn"
ONE = (f"{FFN}.per_token=1", f"{FFN}.experts=4", f"{FFN}.hidden=384")
OWN = (f"{FFN}.balance_weight=0.0",)
SMALL = (
    "--config.model.depth=2",
    "--config.model.width=64",
    *(f"--config.train.{x}=400" for x in ("steps", "eval_every", "save_every")),
)
STUDY: Mapping[str, tuple[str, ...]] = {
    "base": (*ONE, *OWN),
    "block_ffn": OWN,
    "cosine_top_k": (),
    "expert_choice_by_position": OWN,
    "hash_bigram": ONE,
    "hash_position": ONE,
    "hash_previous": ONE,
    "hash_random": ONE,
    "k_means": (),
    "multi_hash": (),
    "noisy_top_k": OWN,
    "remoe": OWN,
    "s_base": OWN,
    "selective_sinkhorn": OWN,
    "sigma_moe": OWN,
    "sigmoid_top_k": (*OWN, f"{FFN}.bias_rate=0.001"),
    "softmax_top_k": (),
    "switch": ONE,
    "top_k_softmax": (),
}
AGAINST = "softmax_top_k"
MARGIN = 0.03  # nats: one perplexity at 33, the paper's margin
LATE = 5  # logged steps whose balance is averaged
MEASURES = {"loss": "eval_loss", "violation": "load_violation", "dead": "dead_experts"}
COLUMNS = {
    "router": "router",
    "loss": "held-out loss",
    "violation": "excess load",
    "dead": "dead experts",
    "difference": f"loss above {AGAINST}",
    "p": f"p, TOST of {MARGIN} nats",
}


def overrides_of(router: str) -> list[str]:
    """Give the flags that make the mixture config a small one of this router."""
    return [*SMALL, f"{FFN}.router={router}", *STUDY[router]]


def run(router: str, seed: int, more: list[str]) -> dict[str, Any]:
    """Train with one router and seed in a process of its own; give its row."""
    flags = [*overrides_of(router), *more]
    with trained("moe", seed, flags) as workdir:
        summary = json.loads((workdir / "summary.json").read_text())
        logged = read_metrics(workdir)
    row = {"router": router, "seed": seed, "steps": logged[-1]["step"]}
    row["eval_loss"] = summary["eval/loss"]
    row["parameters_total"] = summary["parameters_total"]
    for name in ("load_violation", "load_deviation", "dead_experts"):
        row[name] = float(np.mean([x[f"moe/{name}"] for x in logged[-LATE:]]))
    return row


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Average over seeds, best loss first, and test against the plain router.

    Seed by seed: a seed decides on batches and their order, which weigh more than most
    routers do.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        groups[row["router"]][row["seed"]] = row
    lines = []
    for router, own in groups.items():
        line = {"router": f"`{router}`", "difference": "", "p": ""}
        for column, name in MEASURES.items():
            mean = statistics.mean(float(x[name]) for x in own.values())
            line[column] = f"{mean:.3f}" if column == "loss" else f"{mean:.2f}"
        base = groups.get(AGAINST, {})
        shared = own.keys() & base.keys() if router != AGAINST else ()
        gaps = [
            float(own[s]["eval_loss"]) - float(base[s]["eval_loss"]) for s in shared
        ]
        if len(gaps) > 1:
            line["difference"] = f"{statistics.mean(gaps):+.3f}"
            line["p"] = f"{tost(gaps, margin=MARGIN):.3f}"
        lines.append(line)
    return sorted(lines, key=lambda line: float(line["loss"]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the summary out."""
    return markdown(summary(rows), COLUMNS)


def main(argv: list[str]) -> int:
    """Run what is missing of what is asked for; print the table of all there is."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench routers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--routers", nargs="+", default=sorted(STUDY), choices=STUDY)
    flags, more = parser.parse_known_args(argv)
    wanted = {
        fingerprint_of("moe", seed, [*overrides_of(router), *more]): partial(
            run, router, seed, more
        )
        for seed in range(flags.seeds)
        for router in flags.routers
    }
    sys.stdout.write(table(completed("routers", wanted)) + "\n")
    return 0
