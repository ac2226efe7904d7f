"""The plan of a masked run: which weights, how many, which ones, and when."""

import inspect
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from sparsejax import masked
from sparsejax.config import choose, near, require
from sparsejax.masked.schedules import Ramp

__all__ = ["MaskedConfig"]


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """One member of each of the six tables, with their numbers.

    Densities are live over all weights of what is masked. Masks change at the steps
    ``begin``, ``begin + every``, ... ``end``, counted from 0. Paths are those of
    ``sparsejax.tree``, regexes are searched as ``re.search`` does.
    """

    density: float  # at the end
    initial: float = 1.0  # density before the schedule begins
    structure: str = "unstructured"  # what a mask may look like
    structure_arguments: dict[str, int | str | tuple[int, ...]] = field(
        default_factory=dict
    )
    criterion: str = "magnitude"  # what weights are kept by
    initial_criterion: str = "random"  # and by what before the first step
    allocation: str = "uniform"  # of the density over the layers
    allocation_arguments: dict[str, float | dict[str, float] | tuple[str, ...]] = field(
        default_factory=dict
    )
    schedule: str = "cubic"  # of the density over the steps
    begin: int = 0  # first step whose update changes masks
    end: int = 0  # last such step
    every: int = 100  # steps from one change to the next
    updater: str = "prune"  # how a mask follows from the last one
    updater_arguments: dict[str, float | dict[str, float]] = field(default_factory=dict)
    moved: float = 0.3  # share of the live weights that growing updaters move, at first
    estimator: str = "masked"  # what gradient reaches the stored weights
    estimator_arguments: dict[str, float] = field(default_factory=dict)
    products: str = "dense"  # what masked weights multiply by: all, or live blocks
    include: tuple[str, ...] = ()  # regexes of paths; none: every weight matrix
    exclude: tuple[str, ...] = ()  # regexes of paths that stay dense
    dense_from: int | None = None  # step from which all is live again, if ever
    rewind: int | None = None  # step to whose weights each change of masks goes back
    track: bool = False  # keep the first masks and what was ever live, for metrics
    seed: int = 0  # of whatever is random

    def __post_init__(self) -> None:
        self._check_names()
        self._check_arguments()
        self._check_numbers()
        self._check_steps()
        self._check_contradictions()
        for name in ("include", "exclude"):
            for pattern in getattr(self, name):
                _check_regex(name, pattern)

    def _check_names(self) -> None:
        choose("structure", self.structure, masked.STRUCTURES)
        choose("criterion", self.criterion, masked.CRITERIA)
        choose("initial_criterion", self.initial_criterion, masked.CRITERIA)
        choose("allocation", self.allocation, masked.ALLOCATIONS)
        choose("schedule", self.schedule, masked.SCHEDULES)
        choose("updater", self.updater, masked.UPDATERS)
        choose("estimator", self.estimator, masked.ESTIMATORS)
        choose("products", self.products, masked.PRODUCTS)

    def _check_arguments(self) -> None:
        for name, table in (
            ("structure", masked.STRUCTURES),
            ("allocation", masked.ALLOCATIONS),
            ("estimator", masked.ESTIMATORS),
            ("updater", masked.UPDATERS),
        ):
            given = getattr(self, f"{name}_arguments")
            _check_keywords(f"{name}_arguments", given, table[getattr(self, name)])

    def _check_numbers(self) -> None:
        for name in ("density", "initial"):
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "must be in (0, 1]")
        require(
            self.initial >= self.density,
            "initial",
            self.initial,
            f"must be at least density={self.density}; densities never rise",
        )
        require(
            self.schedule not in masked.STEADY or self.initial in (1.0, self.density),
            "initial",
            self.initial,
            f"schedule={self.schedule!r} has density={self.density} from the first step"
            " on; leave it out, or choose another schedule",
        )
        require(0 < self.moved <= 1, "moved", self.moved, "must be in (0, 1]")
        require(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")

    def _check_steps(self) -> None:
        require(self.begin >= 0, "begin", self.begin, "must not be negative")
        require(self.every > 0, "every", self.every, "must be positive")
        require(
            self.end >= self.begin,
            "end",
            self.end,
            f"must be at least begin={self.begin}",
        )
        require(
            (self.end - self.begin) % self.every == 0,
            "end",
            self.end,
            f"must be begin={self.begin} plus a multiple of every={self.every}, so that"
            " the last change is not missed",
        )

        require(
            self.dense_from is None or self.dense_from > self.end,
            "dense_from",
            self.dense_from,
            f"must be after end={self.end}",
        )
        require(
            self.rewind is None or 0 <= self.rewind <= self.begin,
            "rewind",
            self.rewind,
            f"must be a step from 0 to begin={self.begin}",
        )

    def _check_contradictions(self) -> None:
        schedule = masked.SCHEDULES[self.schedule]
        updater = masked.UPDATERS[self.updater]
        estimator = masked.ESTIMATORS[self.estimator]
        falls = schedule is not masked.SCHEDULES["constant"]
        require(
            updater is not masked.UPDATERS["static"] or not falls,
            "updater",
            self.updater,
            f"never changes a mask, so nothing would follow schedule={self.schedule!r};"
            " choose schedule='constant'",
        )
        require(
            updater not in masked.GROWING or estimator is masked.ESTIMATORS["masked"],
            "updater",
            self.updater,
            "starts grown weights at 0, which estimator="
            f"{self.estimator!r} does not; choose estimator='masked'",
        )
        self._check_partners()
        self._check_products()
        self._check_allocation()
        backward = self.estimator_arguments.get("backward", 1.0)
        require(
            backward >= self.density,
            "estimator_arguments.backward",
            backward,
            f"must be at least density={self.density}, for what is computed with is"
            " trained; raise it",
        )

    def _check_partners(self) -> None:
        """Some members are made for certain others."""
        for kind, table in (
            ("updater", masked.UPDATERS),
            ("estimator", masked.ESTIMATORS),
            ("structure", masked.STRUCTURES),
            ("criterion", masked.CRITERIA),
            ("allocation", masked.ALLOCATIONS),
        ):
            member = table[getattr(self, kind)]
            for other, names in masked.PARTNERS.get(member, {}).items():
                require(
                    getattr(self, other) in names,
                    kind,
                    getattr(self, kind),
                    f"works only with {other} {' or '.join(map(repr, names))}, not"
                    f" {getattr(self, other)!r}; choose one of them",
                )

    def _check_products(self) -> None:
        """Some members have no blocks, or need the gradient of dead ones always."""
        for kind, names in masked.PRODUCTS[self.products].items():
            value = getattr(self, kind)
            require(
                value in names,
                "products",
                self.products,
                f"works only with {kind} {' or '.join(map(repr, names))}, not"
                f" {value!r}; choose one of them, or products='dense'",
            )

    def _check_allocation(self) -> None:
        allocation = masked.ALLOCATIONS[self.allocation]
        growing = masked.UPDATERS[self.updater] in masked.GROWING
        require(
            allocation not in masked.RANKED_BY or not growing,
            "allocation",
            self.allocation,
            f"ranks what is live, and updater={self.updater!r} needs counts before it"
            " grows; choose 'uniform', 'erk' or 'momentum', or updater='prune'",
        )
        require(
            allocation not in masked.SHARED_BY
            or (growing and self.schedule in masked.STEADY),
            "allocation",
            self.allocation,
            "shares out what is dropped; choose updater='sparse_momentum', or another"
            " that grows, and schedule='constant'",
        )

    @property
    def ramp(self) -> Ramp:
        """What the schedule sees, for a layer of average density."""
        return Ramp(self.initial, self.density, self.begin, self.end, self.every)


def _check_keywords(field: str, given: Mapping[str, Any], function: Any) -> None:
    """Refuse what a member of a table would not take, and ask for what it needs."""
    known = {
        name: x
        for name, x in inspect.signature(function).parameters.items()
        if x.kind is x.KEYWORD_ONLY
    }
    for name, value in given.items():
        where = f"{field}.{name}"
        rule = f"no argument of {function.__name__}{near(name, known)}"
        require(name in known, where, value, rule)
        _check_value(where, value, known[name])
        _check_range(where, value, known[name], masked.RANGES.get(function, {}))
    for name, x in known.items():
        missing = x.default is x.empty and name not in given
        rule = f"{function.__name__} needs {name}; give it"
        require(not missing, field, dict(given), rule)


def _check_value(field: str, value: Any, known: inspect.Parameter) -> None:
    """Ask for the type that a member declares; an axis may have a letter for it."""
    kind = known.annotation
    letter = known.name == "axis" and isinstance(value, str)
    name = kind.__name__ if get_origin(kind) is None else str(kind)
    rule = f"must be of type {name}"
    require(letter or _fits(kind, value), field, value, rule)


def _check_range(
    field: str,
    value: Any,
    known: inspect.Parameter,
    ranges: Mapping[str, tuple[int, int | None]],
) -> None:
    if known.name not in ranges:
        return
    least, most = ranges[known.name]
    given = value.values() if isinstance(value, Mapping) else [value]
    inside = all(math.isfinite(x) and least <= x <= (most or x) for x in given)
    rule = f"must be in [{least}, {most}]" if most else f"must be at least {least}"
    if known.default is not known.empty:
        rule += f"; the default is {known.default}"
    require(inside, field, value, rule)


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind; an int is a float, a bool is neither."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer is types.UnionType:
        return any(_fits(one, value) for one in inner)
    if outer is None:
        return type(value) in ((int, float) if kind is float else (kind,))
    if not isinstance(value, outer):
        return False
    item = inner[0] if outer is tuple else inner[-1]
    return all(_fits(item, x) for x in (value if outer is tuple else value.values()))


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        require(False, name, pattern, f"must be a regular expression ({error})")
