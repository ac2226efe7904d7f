"""Do masks do what their papers say? Four claims, on perceptrons of a few seconds each.

    python -m sparsejax.bench claims

Methods have the numbers of their papers where these do not depend on the length of a
run, and are not tuned. The one thing that is chosen is each task's learning rate: of
three, the one at which the dense network does best, on seeds that nothing else uses. A
run is a row of ``results/claims.csv``; runs that are there already, by the fingerprint
of their settings, are not run again, so the study can be made in pieces. What they say
of each claim goes to ``results/verdicts.csv``.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from sparsejax.bench.facts import interval
from sparsejax.bench.perceptron import TASKS, Data, Run, Trainer, trainer, weights
from sparsejax.bench.table import markdown, provenance, read_rows, write_rows
from sparsejax.config import fingerprint
from sparsejax.masked import MaskedConfig, window

STEPS = {"digits": 1000, "bytes": 2000}
UNITS = {"digits": "points of accuracy", "bytes": "% of the loss"}
HIDDEN = 256
RATES = (1e-3, 3e-3, 1e-2)
CHOOSING = range(1000, 1003)  # seeds that one of these is chosen on
SEEDS = range(1000)  # of all else
WIDTHS = (16, 64, 256)
DENSITIES = (0.1, 0.05)
GROUPS = (8, 16)
AVERAGES = (0.6, 0.4)
STANDS_FOR = {"structure_decay": "halving"}  # the schedule that makes it

COLUMNS = {"claim": "claim", "found": "found", "verdict": "verdict"}
ROWS = {"setting": "setting", "weights": "weights", "average": "on average"}
ROWS |= {"accuracy": "accuracy, %", "loss": "loss, nats"}

Rows = Mapping[str, Mapping[int, Mapping[str, str]]]  # by setting and seed


def _run(
    task: str, rate: float, plan: Mapping[str, Any] | None = None, hidden: int = HIDDEN
) -> Run:
    masked = None if plan is None else MaskedConfig(**plan)
    given = {"hidden": hidden, "learning_rate": rate, "steps": STEPS[task]}
    return Run(task=task, masked=masked, **given)


def _moving(density: float, updater: str, task: str) -> dict[str, Any]:
    """Sparse from the start; what moves does so for three quarters of the run."""
    plan = {"density": density, "updater": updater, "schedule": "constant"}
    every = STEPS[task] // 50
    span = {"begin": every, "end": 37 * every, "every": every}
    return plan | {"allocation": "erk"} | span


def _groups(m: int, estimator: str, task: str, **changes: Any) -> dict[str, Any]:
    """One of each m inputs, in both hidden layers; masks follow the weights."""
    plan = {"density": 1 / m, "structure": "n_of_m", "structure_arguments": {"m": m}}
    plan |= {"schedule": "constant", "initial_criterion": "magnitude", "every": 1}
    plan |= {"updater": "select", "exclude": ("third",), "estimator": estimator}
    return plan | {"begin": 0, "end": STEPS[task] - 1} | changes


def _journey(density: float) -> dict[str, Any]:
    """Pruned between a quarter and three quarters of the compute."""
    span = window(STEPS["bytes"], density, every=25)
    plan = {"density": density, "schedule": "geometric", "allocation": "global"}
    return plan | span._asdict() | {"every": 25}


def _average(density: float) -> float:
    """Give the mean density of a run that is pruned so."""
    plan, steps = MaskedConfig(**_journey(density)), STEPS["bytes"]
    count = (plan.end - plan.begin) // plan.every + 1
    falling = [density ** ((k + 1) / count) for k in range(count - 1)]
    spent = plan.begin + plan.every * sum(falling)
    return (spent + density * (steps - plan.end)) / steps


def _width(share: float) -> int:
    """Find the width of a dense network with that share of the weights."""
    wanted = share * weights("bytes", HIDDEN)
    return min(range(8, HIDDEN), key=lambda h: abs(weights("bytes", h) - wanted))


def _methods(task: str) -> dict[str, dict[str, Any]]:
    """Give the plans that are compared with each other, on one task."""
    plans = {
        f"{updater}, {density:.0%}": _moving(density, updater, task)
        for density in DENSITIES
        for updater in ("static", "set", "rigl")
    }
    fade = {"begin": STEPS[task] // 10, "end": STEPS[task] * 9 // 10}
    for m in GROUPS:
        gradual = {"schedule": "halving", "initial": (m - 1) / m, **fade}
        plans |= {
            f"ste, 1:{m}": _groups(m, "straight_through", task),
            f"sr_ste, 1:{m}": _groups(m, "sr_ste", task),
            f"mask_decay, 1:{m}": _groups(m, "mask_decay", task, **fade),
            f"structure_decay, 1:{m}": _groups(m, "straight_through", task, **gradual),
        }
    return plans


def settings(rates: Mapping[str, float]) -> dict[str, Run]:
    """Name every run of the study, given each task's learning rate."""
    digits, text = (functools.partial(_run, x, rates[x]) for x in ("digits", "bytes"))
    found = {"dense": digits(), "dense, bytes": text()}
    for task, run in (("digits", digits), ("bytes", text)):
        plans = _methods(task)
        found |= {f"{name}, {task}": run(plan) for name, plan in plans.items()}
    for hidden in WIDTHS:
        plan = _moving(0.1, "static", "digits")
        found[f"dense, width {hidden}"] = digits(hidden=hidden)
        found[f"static, width {hidden}"] = digits(plan, hidden=hidden)
    for density in AVERAGES:
        found[f"journey to {density:.0%}"] = text(_journey(density))
        hidden = _width(_average(density))
        found[f"dense for {density:.0%}"] = text(hidden=hidden)
    return found


def choosing() -> dict[str, Run]:
    """Name the runs that a learning rate is chosen by."""
    return {
        f"dense, {task}, rate {rate}": _run(task, rate)
        for task in TASKS
        for rate in RATES
    }


def chosen(rows: Rows) -> dict[str, float]:
    """Choose each task's learning rate: the dense network is most often right."""
    found: dict[str, dict[float, float]] = {}
    for of in rows.values():
        right = statistics.mean(float(row["accuracy"]) for row in of.values())
        some = next(iter(of.values()))
        found.setdefault(some["task"], {})[float(some["learning_rate"])] = right
    return {task: max(of, key=of.__getitem__) for task, of in found.items()}


def mark(run: Run, seed: int) -> str:
    """Fingerprint a run with its seed."""
    return f"{fingerprint(run)}-{seed}"


def _study(runs: Mapping[str, Run], seeds: range) -> None:
    """Run what is missing, seed by seed: a study cut short has some seeds of all."""
    trainers = {name: trainer(run) for name, run in runs.items()}
    for seed in seeds:
        for name, run in runs.items():
            measured(name, run, seed, trainers[name])


@functools.lru_cache(maxsize=len(TASKS))
def _data(task: str, seed: int) -> Data:
    return TASKS[task].data(seed)


def measured(name: str, run: Run, seed: int, train: Trainer) -> None:
    """Run and write a row, unless there is one."""
    rows = read_rows("claims")  # another may have written meanwhile
    if mark(run, seed) in {row["fingerprint"] for row in rows}:
        return
    found = train(jax.random.key(seed), _data(run.task, seed))
    row = {"setting": name, "task": run.task, "hidden": run.hidden}
    row |= {"learning_rate": run.learning_rate, "steps": run.steps, "seed": seed}
    row["fingerprint"] = mark(run, seed)
    row |= {"loss": round(float(found.loss), 5)}
    row |= {"accuracy": round(float(found.accuracy), 5)}
    row |= {"weights": round(float(found.nonzero))}
    row |= {"average_weights": round(float(found.average))}
    write_rows("claims", [*rows, row | provenance()])


class Found(NamedTuple):
    """A claim, and the mean of a difference with half of its 95 % interval."""

    method: str  # that it is about, by the name a config chooses it by
    claim: str
    mean: float
    half: float
    unit: str
    margin: float | None = None  # the difference is claimed to be within it, not > 0

    @property
    def verdict(self) -> str:
        """Say what the interval allows to say."""
        low, high = self.mean - self.half, self.mean + self.half
        if self.margin is None:
            return "holds" if low > 0 else "is contradicted" if high < 0 else "open"
        if max(abs(low), abs(high)) <= self.margin:
            return "holds"
        apart = low > self.margin or high < -self.margin
        return "is contradicted" if apart else "open"


def _differences(rows: Rows, one: str, other: str) -> list[float]:
    """Say seed by seed how much better one setting is than another.

    In points of accuracy for digits, in per cent of the loss for bytes.
    """
    found = []
    for seed in sorted(set(rows[one]) & set(rows[other])):
        a, b = rows[one][seed], rows[other][seed]
        if a["task"] == "digits":
            found.append(100 * (float(a["accuracy"]) - float(b["accuracy"])))
        else:
            found.append(100 * (float(b["loss"]) / float(a["loss"]) - 1))
    return found


def _pairs() -> Iterator[tuple[str, str]]:
    for density in DENSITIES:
        for one, other in (("set", "static"), ("rigl", "set"), ("rigl", "static")):
            yield f"{one}, {density:.0%}", f"{other}, {density:.0%}"
    for m in GROUPS:
        yield f"sr_ste, 1:{m}", f"ste, 1:{m}"
        for name in ("mask_decay", "structure_decay"):
            yield f"{name}, 1:{m}", f"sr_ste, 1:{m}"


def findings(rows: Rows) -> Iterator[Found]:
    """Test each claim for which there are two seeds."""
    for method, claim, values, unit, margin in _compared(rows):
        if len(values) > 1:
            yield Found(method, claim, *interval(values), unit, margin)


def _compared(rows: Rows) -> Iterator[tuple[str, str, list[float], str, float | None]]:
    for task in TASKS:
        for one, other in _pairs():
            values = _differences(rows, f"{one}, {task}", f"{other}, {task}")
            name, _, size = one.partition(", ")
            claim = f"`{name}` above `{other.partition(',')[0]}`, {size}, {task}"
            yield STANDS_FOR.get(name, name), claim, values, UNITS[task], None
    for density in AVERAGES:
        names = f"journey to {density:.0%}", f"dense for {density:.0%}"
        claim = f"pruned to {density:.0%} within 1 % of dense with the average weights"
        yield "geometric", claim, _differences(rows, *names), UNITS["bytes"], 1.0
    for narrow, wide in itertools.pairwise(WIDTHS):
        gaps = [
            _differences(rows, f"dense, width {w}", f"static, width {w}")
            for w in (narrow, wide)
        ]
        closed = [a - b for a, b in zip(*gaps, strict=False)]
        claim = f"random pruning to 10 % closes on dense from width {narrow} to {wide}"
        yield "erk", claim, closed, UNITS["digits"], None


def summary(rows: Rows) -> list[dict[str, str]]:
    """Average every setting over its seeds."""
    lines = []
    for name, of in rows.items():
        if not of:
            continue
        line = {"setting": name}
        for key, factor in (("accuracy", 100), ("loss", 1)):
            mean, half = interval([factor * float(x[key]) for x in of.values()])
            line[key] = f"{mean:.3g} ± {half:.2g}"
        some = next(iter(of.values()))
        line["weights"] = f"{int(some['weights']):,}"
        line["average"] = f"{int(some['average_weights']):,}"
        lines.append(line)
    return lines


def by_setting(
    rows: Iterable[Mapping[str, str]], runs: Mapping[str, Run], seeds: range
) -> Rows:
    """Find the rows of these runs and seeds, whatever they were called then."""
    known = {row["fingerprint"]: row for row in rows}
    found = {}
    for name, run in runs.items():
        of = f"{fingerprint(run)}-"
        found[name] = {s: known[f"{of}{s}"] for s in seeds if f"{of}{s}" in known}
    return found


def verdicts(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Say what the rows say of each claim."""
    rates = chosen(by_setting(rows, choosing(), CHOOSING))
    return [
        {
            "method": x.method,
            "claim": x.claim,
            "found": f"{x.mean:+.2f} ± {x.half:.2f} {x.unit}",
            "verdict": x.verdict,
        }
        for x in findings(by_setting(rows, settings(rates), SEEDS))
    ]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay the verdicts out."""
    return markdown(verdicts(rows), COLUMNS)


def main(argv: list[str]) -> int:
    """Run what is missing; print all that was found."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench claims")
    parser.add_argument("--seeds", type=int, default=5)
    flags = parser.parse_args(argv)
    _study(choosing(), CHOOSING)
    _study(_chosen_settings(), SEEDS[: flags.seeds])
    rows = read_rows("claims")
    for runs, seeds in ((choosing(), CHOOSING), (_chosen_settings(), SEEDS)):
        lines = summary(by_setting(rows, runs, seeds))
        sys.stdout.write(markdown(lines, ROWS) + "\n\n")
    found = verdicts(rows)
    write_rows("verdicts", [line | provenance() for line in found])
    sys.stdout.write(markdown(found, COLUMNS) + "\n")
    return 0


def _chosen_settings() -> dict[str, Run]:
    rows = by_setting(read_rows("claims"), choosing(), CHOOSING)
    return settings(chosen(rows))
