"""Sweeps as data: axes of choices, multiplied, and the points that they make.

A sweep file has ``get_sweep() -> Sweep``. An axis is a list of ``Choice``: fields to
set, by path, and rules for fields that follow from others (steps from a budget). Axes
combine by ``product``, ``zipped`` and ``+``. ``points`` gives a checked config for each
combination and seed; nothing is run here.
"""

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from sparsejax.config import ConfigError, convert, fingerprint
from sparsejax.data import ByteTokenizer
from sparsejax.nn import ModelConfig, Transformer
from sparsejax.nn.cost import Cost, cost
from sparsejax.train.config import Config

__all__ = [
    "Choice",
    "Point",
    "Sweep",
    "axis",
    "iso_flops",
    "iso_parameters",
    "planned_cost",
    "points",
    "product",
    "token_budgets",
    "variants",
    "zipped",
]

Values = dict[str, Any]
Rule = Callable[[Values], Mapping[str, Any]]  # from all values to fields to set
CLOSE = 0.1  # how far, relatively, a size or budget may lie from what was asked


class Choice(NamedTuple):
    """One value of an axis: its names in the table, fields to set, rules to follow."""

    labels: dict[str, Any]
    changes: dict[str, Any]
    rules: tuple[Rule, ...] = ()


Axis = list[Choice]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything that decides a study; ``rules`` are followed last, for each point."""

    base: ConfigDict
    axes: Axis
    seeds: tuple[int, ...] = (0,)
    rules: tuple[Rule, ...] = ()  # the learning rate's, and a mask's schedule


class Point(NamedTuple):
    """One run: its config, as values and checked, and its names in the table."""

    labels: dict[str, Any]
    values: Values
    config: Config
    fingerprint: str


def axis(path: str, values: Sequence[Any], *, label: str | None = None) -> Axis:
    """Set one field to each of several values."""
    name = label or path.rpartition(".")[2]
    return [Choice({name: value}, {path: value}) for value in values]


def variants(label: str, changes: Mapping[str, Mapping[str, Any]]) -> Axis:
    """Set several fields at once, under a name."""
    return [Choice({label: name}, dict(change)) for name, change in changes.items()]


def product(*axes: Axis) -> Axis:
    """Combine every choice of each axis with every choice of the others."""
    return [_joined(group) for group in itertools.product(*axes)]


def zipped(*axes: Axis) -> Axis:
    """Combine first choices, second choices, and so on.

    Raises:
        ConfigError: if the axes are not equally long.
    """
    lengths = [len(choices) for choices in axes]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipped axes have {lengths} choices: must be equally long")
    return [_joined(group) for group in zip(*axes, strict=True)]


def _joined(group: Sequence[Choice]) -> Choice:
    changes: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for choice in group:
        twice = changes.keys() & choice.changes.keys()
        if twice:
            raise ConfigError(
                f"config.{min(twice)}: set by two axes; leave it to one of them"
            )
        if twice := labels.keys() & choice.labels.keys():
            raise ConfigError(
                f"label {min(twice)!r}: of two axes; give one of them another, label=…"
            )
        changes |= choice.changes
        labels |= choice.labels
    return Choice(labels, changes, tuple(r for choice in group for r in choice.rules))


def token_budgets(tokens: Sequence[float | int]) -> Axis:
    """Set the steps so that each run sees so many tokens."""
    return [
        Choice({"budget": wanted}, {}, (functools.partial(_steps, wanted=wanted),))
        for wanted in tokens
    ]


def iso_flops(budgets: Sequence[float | int]) -> Axis:
    """Set the steps so that each run spends so many useful FLOPs, masks not counted."""
    return [
        Choice({"flops": wanted}, {}, (functools.partial(_spend, flops=wanted),))
        for wanted in budgets
    ]


def iso_parameters(
    counts: Sequence[float | int], *, multiple: int = 16, kind: str = "active"
) -> Axis:
    """Set the width so that each model has so many parameters.

    Args:
        counts: the parameters wanted.
        multiple: of the widths that are tried.
        kind: ``total`` or ``active``.
    """
    return [
        Choice(
            {"size": wanted},
            {},
            (functools.partial(_widen, wanted=wanted, multiple=multiple, kind=kind),),
        )
        for wanted in counts
    ]


def _steps(values: Values, *, wanted: float | int) -> dict[str, Any]:
    each = values["data"]["batch_size"] * values["data"]["seq_len"]
    steps = round(wanted / each)
    _near(f"a budget of {wanted:g} tokens", steps * each, wanted, f"{each} a step")
    return {"train.steps": steps}


def _spend(values: Values, *, flops: float | int) -> dict[str, Any]:
    each = values["data"]["batch_size"] * values["data"]["seq_len"]
    step = planned_cost(values).useful_flops * each
    steps = round(flops / step)
    _near(f"a budget of {flops:g} FLOPs", steps * step, flops, f"{step:.3g} a step")
    return {"train.steps": steps}


def _widen(
    values: Values, *, wanted: float | int, multiple: int, kind: str
) -> dict[str, Any]:
    def count(times: int) -> float | int:
        model = values["model"] | {"width": times * multiple}
        return getattr(planned_cost(values | {"model": model}), kind)

    low, high = 1, 2
    while count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    best = min((low, high), key=lambda times: abs(count(times) - wanted))
    detail = f"widths are multiples of {multiple}"
    _near(f"a size of {wanted:g} parameters", count(best), wanted, detail)
    return {"model.width": best * multiple}


def _near(what: str, found: float | int, wanted: float | int, detail: str) -> None:
    if abs(found - wanted) > CLOSE * wanted:
        raise ConfigError(
            f"{what}: cannot be reached, the nearest is {found:g} ({detail}); ask for"
            " another, or change the batch or the model"
        )


def planned_cost(values: Values, live: Mapping[str, float] | None = None) -> Cost:
    """Count parameters and FLOPs of a config's model without building it.

    Args:
        values: the config's.
        live: density of what is masked, by path; masks are not counted without it.
    """
    data = values["data"]
    fixed = {"bytes": ByteTokenizer.vocab_size}
    name = data.get("tokenizer", "bytes")
    vocabulary = fixed[name] if name in fixed else data.get("vocab_size", 4096)
    about = [vocabulary, data["seq_len"], values["model"], live]
    key = json.dumps(about, sort_keys=True, default=str)
    if key not in _COSTS:
        config = convert(ModelConfig, values["model"], "config.model")
        model = nnx.eval_shape(
            lambda: Transformer(config, vocabulary, rngs=nnx.Rngs(0))
        )
        params = nnx.state(model, nnx.Param)
        _COSTS[key] = cost(config, params, length=data["seq_len"], live=live)
    return _COSTS[key]


_COSTS: dict[str, Cost] = {}


def points(sweep: Sweep) -> list[Point]:
    """Make every point of a sweep, checked.

    Raises:
        ConfigError: for a field that is not there, a budget that cannot be reached, a
            config that is not legal, or two points that are the same run or are named
            alike.
    """
    found: dict[str, Point] = {}
    for choice in sweep.axes:
        if "seed" in choice.changes:
            raise ConfigError(
                f"config.seed: set by an axis ({choice.labels}), and then by"
                f" seeds={sweep.seeds}; leave it to Sweep(seeds=…)"
            )
        values = copy.deepcopy(sweep.base.to_dict())
        _set(values, choice.changes, choice.labels)
        for rule in (*choice.rules, *sweep.rules):
            _set(values, rule(values), choice.labels)
        for seed in sweep.seeds:
            point = _checked(values | {"seed": seed}, choice.labels)
            if point.fingerprint in found:
                other = found[point.fingerprint].labels
                raise ConfigError(
                    f"two points are the same run: {other} and {point.labels} (seed"
                    f" {seed}); take one of them out of the axes"
                )
            found[point.fingerprint] = point
    if not found:
        raise ConfigError("the sweep has no points; give it axes and seeds")
    _check_names(sweep)
    return list(found.values())


def _check_names(sweep: Sweep) -> None:
    """Refuse choices that nobody could tell apart in the table.

    Raises:
        ConfigError: naming the labels.
    """
    seen = set()
    for choice in sweep.axes:
        name = json.dumps(choice.labels, sort_keys=True, default=str)
        if name in seen:
            raise ConfigError(
                f"two points are named {choice.labels}, and are different runs; give"
                " one of them another label"
            )
        seen.add(name)


def _checked(values: Values, labels: dict[str, Any]) -> Point:
    try:
        config = convert(Config, values)
    except ConfigError as error:
        raise ConfigError(f"{error} (at the point {labels})") from None
    return Point(labels, values, config, fingerprint(config))


def _set(values: Values, changes: Mapping[str, Any], labels: dict[str, Any]) -> None:
    for path, value in changes.items():
        *sections, leaf = path.split(".")
        here = values
        for number, name in enumerate(sections):
            if not isinstance(here.get(name), dict):
                where = ".".join(["config", *sections[: number + 1]])
                raise ConfigError(
                    f"{where}: no such section, so {path!r} cannot be set (at the"
                    f" point {labels})"
                )
            here = here[name]
        here[leaf] = copy.deepcopy(value)
