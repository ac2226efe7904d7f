"""One small language model with every router, at equal budgets: loss, balance, TOST.

    python -m sparsejax.bench routers

All have the same parameters and, but for those that decide it themselves, the same
active parameters: two of eight experts, or one of four that are twice as wide. A router
that balances in a way of its own has no other balancing loss. ``router:variant`` is a
router with settings or experts that a known model has. Each run is a row of
``results/routers.csv``; runs that are there already, by the fingerprint of their
config, are not run again, so the study can be made in pieces. Tables of hashes are made
first, of a dense run's ids, and kept in ``runs/routers``.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.bench.equivalence import tost
from sparsejax.bench.runs import completed, fingerprint_of, trained
from sparsejax.bench.table import ROOT, markdown
from sparsejax.convert import table as write_table
from sparsejax.train.metrics import read_metrics

SMALL = (
    "--config.model.depth=2",
    "--config.model.width=64",
    *(f"--config.train.{x}=400" for x in ("steps", "eval_every", "save_every")),
)
PLACE = Path("runs/routers")  # relative, since it is part of a fingerprint
TABLES = {f"hash_table:{kind}": kind for kind in ("balanced", "clustered", "dispersed")}
WIDE = 4  # experts of twice the width, where a token visits one


def _file(kind: str) -> Path:
    return PLACE / f"{kind}.npy"


def _ffn(*settings: str) -> tuple[str, ...]:
    return tuple(f"--config.model.ffn.{x}" for x in settings)


ONE = _ffn("per_token=1", f"experts={WIDE}", "hidden=384")
OWN = _ffn("balance_weight=0.0")
BIASED = (*OWN, *_ffn("bias_rate=0.001"))
# Not one expert a hop: a single weight is 1, whatever the router says.
HOPS = _ffn("experts=16", "per_token=2", "hidden=96", "hops=2")
GROUPS = _ffn("router_arguments.groups=4", "router_arguments.kept_groups=2")
GPT_OSS = _ffn("router_bias=true", "biases=true", "activation=clamped_swiglu")
STUDY: Mapping[str, tuple[str, ...]] = {
    "base": (*ONE, *OWN),
    "block_ffn": OWN,
    "cosine_top_k": (),
    "cosine_top_k:halting": (*HOPS, *_ffn("halt_below=2.0")),
    "cosine_top_k:hops": HOPS,
    "expert_choice_by_position": OWN,
    "hash_bigram": ONE,
    "hash_position": ONE,
    "hash_previous": ONE,
    "hash_random": ONE,
    **{name: (*ONE, *_ffn(f"table={_file(kind)}")) for name, kind in TABLES.items()},
    "k_means": (),
    "multi_hash": (),
    "noisy_top_k": OWN,
    "remoe": OWN,
    "s_base": OWN,
    "selective_sinkhorn": OWN,
    "sigma_moe": OWN,
    "sigmoid_top_k": BIASED,
    "sigmoid_top_k:groups": (*BIASED, *GROUPS),
    "softmax_top_k": (),
    "softmax_top_k:fine": _ffn("experts=16", "per_token=4", "hidden=96"),
    "softmax_top_k:frozen": (*OWN, "--config.optim.rates.router=0.0"),
    "softmax_top_k:shared": _ffn(
        "experts=14", "per_token=2", "hidden=96", "shared=192"
    ),
    "softmax_top_k:squared_relu": _ffn(
        "gated=false", "activation=squared_relu", "hidden=288"
    ),
    "softmax_top_k:unnormalised": _ffn("router_arguments.renormalize=false"),
    "switch": ONE,
    "top_k_softmax": (),
    "top_k_softmax:gpt_oss": GPT_OSS,
}
AGAINST = "softmax_top_k"
MARGIN = 0.03  # nats: one perplexity at 33, the paper's margin
LATE = 5  # logged steps whose balance is averaged
LOGGED = ("load_violation", "load_deviation", "dead_experts", "visits")
MEASURES = {
    "loss": "eval_loss",
    "violation": "load_violation",
    "dead": "dead_experts",
    "visits": "visits",
}
COLUMNS = {
    "router": "router",
    "loss": "held-out loss",
    "violation": "excess load",
    "dead": "dead experts",
    "visits": "visits of a token",
    "difference": f"loss above {AGAINST}",
    "p": f"p, TOST of {MARGIN} nats",
}


def overrides_of(router: str) -> list[str]:
    """Give the flags that make the mixture config a small one of this router."""
    return [*SMALL, *_ffn(f"router={router.partition(':')[0]}"), *STUDY[router]]


def write_tables(kinds: Sequence[str]) -> None:
    """Write what is missing of the tables, of the ids of a dense run."""
    missing = [kind for kind in kinds if not _file(kind).exists()]
    if not missing:
        return
    PLACE.mkdir(parents=True, exist_ok=True)
    with trained("dense", 0, SMALL) as workdir:
        for kind in missing:
            write_table(workdir, _file(kind), kind=kind, experts=WIDE, batches=100)


def run(router: str, seed: int, more: list[str]) -> dict[str, Any]:
    """Train with one router and seed in a process of its own; give its row."""
    flags = [*overrides_of(router), *more]
    with trained("moe", seed, flags) as workdir:
        summary = json.loads((workdir / "summary.json").read_text())
        logged = read_metrics(workdir)
    row = {"router": router, "seed": seed, "steps": logged[-1]["step"]}
    row["eval_loss"] = summary["eval/loss"]
    row["parameters_total"] = summary["parameters_total"]
    for name in LOGGED:
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
            found = [float(x[name]) for x in own.values() if x.get(name, "") != ""]
            digits = 3 if column == "loss" else 2
            line[column] = f"{statistics.mean(found):.{digits}f}" if found else ""
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
    with contextlib.chdir(ROOT):
        write_tables([TABLES[name] for name in flags.routers if name in TABLES])
        wanted = {
            fingerprint_of("moe", seed, [*overrides_of(router), *more]): partial(
                run, router, seed, more
            )
            for seed in range(flags.seeds)
            for router in flags.routers
        }
    sys.stdout.write(table(completed("routers", wanted)) + "\n")
    return 0
