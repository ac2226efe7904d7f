"""What does a model forget of what it knew when it learns something new?

    python -m sparsejax.bench forgetting

A small model whose feed-forwards are memories learns nine tenths of 1,700 sentences
about countries. Then it is finetuned on the last tenth, in three ways: all weights
move, or low-rank factors of its matrices, or those rows of its memories that the new
sentences read more than the old ones do. How much of the new and of the old it then
recalls depends on the learning rate, so each way has several. A run is a row of
``results/forgetting.csv``; runs that are there already, by the fingerprints of both
configs, are not run again.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from matplotlib.axes import Axes

from sparsejax.bench.facts import Fact, facts, interval, recall
from sparsejax.bench.runs import completed, fingerprint_of
from sparsejax.bench.table import ROOT, markdown, result
from sparsejax.convert import finetune
from sparsejax.data.corpora import from_files, group_hash, held_out
from sparsejax.train.plots import write_figure
from sparsejax.train.trained import load
from sparsejax.tree import leaves

EVERY = 10  # one fact in so many is new
MODEL, OPTIM, TRAIN = (f"--config.{x}" for x in ("model", "optim", "train"))
MEMORY = f"{MODEL}.memory"
CONFIG = "memory"
BASE = (
    "--config.data.name=countries",
    f"--config.data.validation_every={EVERY}",
    *(f"--config.data.{x}" for x in ("seq_len=128", "batch_size=16")),
    *(f"{MODEL}.{x}" for x in ("depth=2", "width=64", "heads=2", "kv_heads=2")),
    f"{MODEL}.ffn.hidden=192",
    f"{MODEL}.memory_layers=(0, 1)",
    *(f"{MEMORY}.{x}" for x in ("sub_keys=256", "key_width=64", "query_norm=batch")),
    *(f"{MEMORY}.{x}" for x in ("heads=4", "per_head=8")),
    *(f"{OPTIM}.{x}" for x in ("tables=adam", "learning_rate=6e-3")),
    f"{OPTIM}.weight_decay=0.0",
    *(f"{TRAIN}.{x}" for x in ("log_every=500", "eval_every=1000", "eval_batches=2")),
    *(f"{TRAIN}.{x}" for x in ("save_every=1000", "steps=3000")),
)
NEW = (
    "--config.data.name=files",
    "--config.data.validation_every=1000000",  # a single one, which is not asked for
    f"{OPTIM}.schedule=constant",
    *(f"{TRAIN}.{x}_every=100" for x in ("log", "eval", "save")),
    f"{TRAIN}.steps=100",
)


class Way(NamedTuple):
    """How a model follows new text."""

    flags: tuple[str, ...]
    rates: tuple[float, ...]


DENSE = f"{OPTIM}.tables=none"
ROWS = (f"{OPTIM}.tables=sgd", f"{OPTIM}.clip=none")
WAYS: Mapping[str, Way] = {
    "all weights": Way((DENSE,), (1e-4, 3e-4, 1e-3)),
    "low rank, 8": Way((DENSE, f"{OPTIM}.lora.rank=8"), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "1000 rows": Way((*ROWS, f"{OPTIM}.table_rows=1000"), (1e3, 3e3, 1e4)),
}
COLUMNS = {
    "way": "what moves",
    "rate": "learning rate",
    "learned": "new facts recalled, % (95 % interval)",
    "kept": "old facts recalled, %",
    "moved": "weights that moved, %",
    "runs": "runs",
}


def sentences(folder: Path, new: Sequence[Fact]) -> tuple[Path, list[Fact]]:
    """Write facts to a file; give it, and those of them that training on it shows."""
    path = folder / "new.jsonl"
    lines = [json.dumps({"text": fact.start + fact.end}) for fact in new]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = from_files((str(path),), text_field="text", validation_every=1_000_000)
    held = held_out(corpus)
    return path, [x for x in new if group_hash(x.start + x.end) not in held]


def moved(before: nnx.Module, after: nnx.Module) -> float:
    """Give the share of all parameters that are not what they were."""
    both = (leaves(nnx.state(x, nnx.Param)) for x in (before, after))
    one, other = ({p: np.asarray(x) for p, x in tree.items()} for tree in both)
    changed = sum(int(np.sum(x != other[p])) for p, x in one.items())
    return changed / sum(x.size for x in one.values())


def begun(folder: Path, seed: int) -> Path:
    """Train a base in its folder, or see that it is trained."""
    workdir = folder / f"base{seed}"
    command = [sys.executable, "train.py", f"--config=configs/{CONFIG}.py"]
    command += [f"--workdir={workdir}", f"--config.seed={seed}", *BASE]
    subprocess.run(command, cwd=ROOT, check=True)
    return workdir


def run(
    base: Callable[[int], Path], name: str, rate: float, seed: int
) -> dict[str, Any]:
    """Finetune one base, ask it for new and old facts, and give the row."""
    first, (old, new) = base(seed), facts(EVERY)
    with tempfile.TemporaryDirectory() as folder:
        file, asked = sentences(Path(folder), new)
        out = Path(folder) / "run"
        finetune(first, out, batches=200, overrides=flags_of(name, rate, file))
        command = [sys.executable, "train.py", f"--config={out / 'config.json'}"]
        subprocess.run([*command, f"--workdir={out}"], cwd=ROOT, check=True)
        before, tokenizer = load(first)
        after, _ = load(out)
    row = {"way": name, "rate": rate, "seed": seed, "moved": moved(before, after)}
    for key, model in (("before", before), ("after", after)):
        row[f"new_{key}"] = recall(model, tokenizer, asked)
        row[f"old_{key}"] = recall(model, tokenizer, old)
    return row


def flags_of(name: str, rate: float, file: Path) -> list[str]:
    """Give what a run changes of its base's config."""
    read = f"--config.data.files=('{file}',)"
    return [*NEW, read, *WAYS[name].flags, f"{OPTIM}.learning_rate={rate}"]


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds; the base itself is the first line."""
    rows, groups = list(rows), defaultdict(list)
    for row in rows:
        groups[row["way"], float(row["rate"])].append(row)
    first = {row["seed"]: row for row in rows}
    lines = [_line("nothing", None, list(first.values()), "before")]
    order = list(WAYS)
    for way, rate in sorted(groups, key=lambda x: (order.index(x[0]), x[1])):
        lines.append(_line(way, rate, groups[way, rate], "after"))
    return lines


def _line(
    way: str, rate: float | None, rows: Sequence[Mapping[str, Any]], when: str
) -> dict[str, Any]:
    line: dict[str, Any] = {"way": way, "rate": "" if rate is None else f"{rate:g}"}
    line["runs"] = len(rows)
    for key, side in (("learned", "new"), ("kept", "old")):
        mean, half = interval([100 * float(row[f"{side}_{when}"]) for row in rows])
        shown = f"{mean:.1f} ± {half:.1f}" if len(rows) > 1 else f"{mean:.1f}"
        line |= {side: (mean, half), key: shown}
    share = 0.0
    if rate is not None:
        share = 100 * sum(float(row["moved"]) for row in rows) / len(rows)
    return line | {"moved": f"{share:.2f}"}


def draw(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> Axes:
    """Draw what is kept against what is learned, a curve for each way."""
    families = defaultdict(list)
    for line in lines:
        families[line["way"]].append(line)
    for way, of in families.items():
        x, y = (np.array([line[k] for line in of]).T for k in ("new", "old"))
        axes.errorbar(x[0], y[0], y[1], x[1], fmt="o-", capsize=3, label=way)
    axes.set_xlabel("new facts recalled, %")
    axes.set_ylabel("old facts recalled, %")
    axes.legend()
    return axes


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Lay the summary out."""
    return markdown(summary(rows), COLUMNS)


def main(argv: list[str]) -> int:
    """Run what is missing; print the table and draw the picture of what there is."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench forgetting")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs/forgetting")
    flags = parser.parse_args(argv)
    base = functools.cache(partial(begun, flags.workdir))
    wanted = {}
    for seed in range(flags.seeds):
        first = fingerprint_of(CONFIG, seed, BASE)
        for name, way in WAYS.items():
            for rate in way.rates:
                changes = flags_of(name, rate, Path("new.jsonl"))  # wherever it is
                second = fingerprint_of(CONFIG, seed, [*BASE, *changes])
                make = partial(run, base, name, rate, seed)
                wanted[f"{first}-{second}"] = make
    lines = summary(completed("forgetting", wanted))
    write_figure(result("forgetting.png"), partial(draw, lines=lines))
    sys.stdout.write(markdown(lines, COLUMNS) + "\n")
    return 0
