"""The plan of a masked run: which weights, how many, which ones, and when."""

import re
from dataclasses import dataclass, field

from sparsejax import masked
from sparsejax.config import choose, require
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
    allocation_arguments: dict[str, float | dict[str, float]] = field(
        default_factory=dict
    )
    schedule: str = "cubic"  # of the density over the steps
    begin: int = 0  # first step whose update changes masks
    end: int = 0  # last such step
    every: int = 100  # steps from one change to the next
    updater: str = "prune"  # how a mask follows from the last one
    moved: float = 0.3  # share of the live weights that set and rigl move, at first
    estimator: str = "masked"  # what gradient reaches the stored weights
    estimator_arguments: dict[str, float] = field(default_factory=dict)
    include: tuple[str, ...] = ()  # regexes of paths; none: every weight matrix
    exclude: tuple[str, ...] = ()  # regexes of paths that stay dense
    seed: int = 0  # of whatever is random

    def __post_init__(self) -> None:
        self._check_names()
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

    @property
    def ramp(self) -> Ramp:
        """What the schedule sees, for a layer of average density."""
        return Ramp(self.initial, self.density, self.begin, self.end, self.every)


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        require(False, name, pattern, f"must be a regular expression ({error})")
