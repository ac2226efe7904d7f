"""How many facts does a model know by heart? Dense, routed and with memories.

    python -m sparsejax.bench facts

Small language models of equal useful FLOPs learn 1,700 sentences about countries for
the same number of steps; a fact is recalled if, after the sentence's beginning, every
byte of its end is the model's first choice. Held-out sentences show how much of that
can be guessed. A run is a row of ``results/facts.csv``; runs that are there already, by
the fingerprint of their config, are not run again.
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from scipy import stats

from sparsejax.bench.runs import completed, fingerprint_of, trained
from sparsejax.bench.table import markdown, result
from sparsejax.data.corpora import CORPORA, group_hash, held_out
from sparsejax.nn.transformer import Transformer
from sparsejax.train.metrics import read_metrics
from sparsejax.train.plots import write_figure
from sparsejax.train.trained import load
from sparsejax.typing import Array, Bool, Int

CORPUS = "countries"
EVERY = 20  # one fact in so many is held out
LENGTH = 128  # bytes that the longest fact and its start fit in
BATCH = 64  # facts that are asked for at a time
ENDS = re.compile(r"(.* is (?:called |in )?)(.+\n)", re.DOTALL)

MODEL, FFN, MEMORY = (f"--config.model{x}" for x in ("", ".ffn", ".memory"))
COMMON = (
    f"--config.data.name={CORPUS}",
    f"--config.data.validation_every={EVERY}",
    *(f"{MODEL}.{x}" for x in ("depth=2", "width=64", "heads=2", "kv_heads=2")),
    *(f"--config.train.{x}_every=100" for x in ("log", "eval", "save")),
    "--config.train.eval_batches=2",
)
SECOND = (
    f"{FFN}.hidden=192",
    f"{MODEL}.memory_layers=(1,)",
    *(f"{MEMORY}.{x}" for x in ("heads=4", "per_head=8")),
)
# Wider keys where there are fewer: the products are as many.
FEW = (f"{MEMORY}.sub_keys=32", f"{MEMORY}.key_width=88")
MANY = (f"{MEMORY}.sub_keys=128", f"{MEMORY}.key_width=46")
STUDY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("dense", (f"{FFN}.hidden=192",)),
    "moe, 8": ("moe", (f"{FFN}.hidden=96", f"{FFN}.experts=8")),
    "moe, 32": ("moe", (f"{FFN}.hidden=96", f"{FFN}.experts=32")),
    "product keys, 1k": ("memory", (*SECOND, *FEW)),
    "product keys, 16k": ("memory", (*SECOND, *MANY)),
    "peer, 1k": ("peer", (*SECOND, *FEW)),
    "peer, 16k": ("peer", (*SECOND, *MANY)),
}
COLUMNS = {
    "model": "model",
    "recalled": "facts recalled, % (95 % interval)",
    "guessed": "held-out facts, %",
    "total": "parameters",
    "flops": "useful MFLOPs a token",
}


class Fact(NamedTuple):
    """A sentence: what is given, and what a model that knows it goes on with."""

    start: str
    end: str


def cut(sentence: str) -> Fact:
    """Cut a sentence before what it tells.

    Raises:
        ValueError: if it does not say what anything is.
    """
    found = ENDS.fullmatch(sentence)
    if found is None:
        raise ValueError(f"{sentence!r} has no ' is ' before its last words")
    return Fact(*found.groups())


def facts(every: int = EVERY) -> tuple[list[Fact], list[Fact]]:
    """Give the facts that training has shown, and those held out."""
    corpus = CORPORA[CORPUS](every)
    held, shown, hidden = held_out(corpus), [], []
    for document in corpus.documents():
        side = hidden if group_hash(document.group) in held else shown
        side.append(cut(document.text))
    return shown, hidden


def recall(model: Transformer, tokenizer: Any, asked: Sequence[Fact]) -> float:
    """Give the share of facts whose end is, token by token, the first choice.

    Feeding the true end is the same as decoding greedily: the two part only after a
    first wrong token, which makes the fact wrong anyway.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def right(state: Any, tokens: Array, answer: Array) -> Array:
        return _right(nnx.merge(graph, state), tokens, answer)

    batches = _batches(tokenizer, asked)
    counts = [np.asarray(right(state, *batch))[:real].sum() for *batch, real in batches]
    return float(sum(counts)) / len(asked)


def _right(
    model: Transformer, tokens: Int[Array, "b t"], answer: Bool[Array, "b t"]
) -> Bool[Array, " b"]:
    """Say which rows have every token marked as answer predicted by those before."""
    first = jnp.argmax(model.logits(model(tokens).value), axis=-1)
    return jnp.all((first[:, :-1] == tokens[:, 1:]) | ~answer[:, 1:], axis=1)


def _batches(tokenizer: Any, asked: Sequence[Fact]) -> Iterator[tuple[Any, Any, int]]:
    for index in range(0, len(asked), BATCH):
        part = asked[index : index + BATCH]
        tokens = np.full((BATCH, LENGTH), tokenizer.pad, np.int32)
        answer = np.zeros((BATCH, LENGTH), bool)
        for row, (start, end) in enumerate(part):
            begin, rest = tokenizer.encode(start), tokenizer.encode(end)
            whole = np.concatenate([[tokenizer.bos], begin, rest])
            tokens[row, : len(whole)] = whole
            answer[row, len(whole) - len(rest) : len(whole)] = True
        yield tokens, answer, len(part)


def run(name: str, seed: int, more: list[str]) -> dict[str, Any]:
    """Train one model, ask it for all facts, and give its row."""
    config, overrides = STUDY[name]
    flags = [*COMMON, *overrides, *more]
    begin = time.perf_counter()
    with trained(config, seed, flags) as workdir:
        seconds = time.perf_counter() - begin
        summary = json.loads((workdir / "summary.json").read_text())
        steps = read_metrics(workdir)[-1]["step"]
        model, tokenizer = load(workdir)
    shown, hidden = facts()
    return {
        "model": name,
        "seed": seed,
        "steps": steps,
        "recalled": recall(model, tokenizer, shown),
        "guessed": recall(model, tokenizer, hidden),
        "parameters_total": summary["parameters_total"],
        "useful_flops_per_token": summary["useful_flops_per_token"],
        "seconds": round(seconds, 1),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Give the mean and half of its 95 % interval, by Student's t."""
    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), error * float(stats.t.ppf(0.975, len(values) - 1))


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds, the best memory first."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"]].append(row)
    lines = []
    for name, group in groups.items():
        mean, half = interval([100 * float(row["recalled"]) for row in group])
        guessed = statistics.mean(100 * float(row["guessed"]) for row in group)
        lines.append(
            {
                "model": name,
                "mean": mean,
                "half": half,
                "recalled": f"{mean:.1f} ± {half:.1f}",
                "guessed": f"{guessed:.1f}",
                "parameters": int(group[0]["parameters_total"]),
                "total": f"{int(group[0]['parameters_total']):,}",
                "flops": f"{int(group[0]['useful_flops_per_token']) / 1e6:.2f}",
            }
        )
    return sorted(lines, key=lambda line: -line["mean"])


def draw(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> Axes:
    """Draw facts recalled against parameters; bars are the intervals."""
    families = defaultdict(list)
    for line in lines:
        families[line["model"].partition(",")[0]].append(line)
    for name, of in families.items():
        of.sort(key=lambda line: line["parameters"])
        x, y, bars = ([line[k] for line in of] for k in ("parameters", "mean", "half"))
        axes.errorbar(x, y, bars, fmt="o-", capsize=4, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("facts recalled, %")
    axes.legend()
    return axes


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Lay the summary out."""
    return markdown(summary(rows), COLUMNS)


def main(argv: list[str]) -> int:
    """Run what is missing; print the table and draw the picture of what there is."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench facts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=list(STUDY), choices=STUDY)
    parser.add_argument("--steps", type=int, default=800)
    flags, more = parser.parse_known_args(argv)
    more = [f"--config.train.steps={flags.steps}", *more]
    wanted = {}
    for seed in range(flags.seeds):
        for name in flags.models:
            config, overrides = STUDY[name]
            mark = fingerprint_of(config, seed, [*COMMON, *overrides, *more])
            wanted[mark] = partial(run, name, seed, more)
    lines = summary(completed("facts", wanted))
    write_figure(result("facts.png"), partial(draw, lines=lines))
    sys.stdout.write(markdown(lines, COLUMNS) + "\n")
    return 0
