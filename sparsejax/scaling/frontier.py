"""What to do with a budget: allocations, frontiers, IsoFLOP valleys, power laws."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

__all__ = [
    "Allocation",
    "Valley",
    "allocate",
    "chinchilla_optimum",
    "effective_size",
    "frontier",
    "power_law",
    "routing_cutoff",
    "size_multiplier",
    "valleys",
]

POINTS = 400  # of the coarse search, so that a second valley is not missed

Loss = Callable[[Any, Any], Any]


class Allocation(NamedTuple):
    """How a compute budget is spent best."""

    flops: float
    parameters: float
    tokens: float
    loss: float


class Valley(NamedTuple):
    """The parabola through one budget's losses over the logarithm of parameters."""

    flops: float
    parameters: float  # at the bottom
    tokens: float
    loss: float
    curvature: float  # of loss over the natural logarithm of parameters, squared
    inside: bool  # whether sizes on both sides of the bottom were run


def six_each(parameters: Any) -> Any:
    """Give the usual estimate of a dense model's FLOPs a token in training."""
    return 6.0 * parameters


def allocate(
    loss: Loss,
    flops: float,
    *,
    per_token: Callable[[Any], Any] = six_each,
    sizes: tuple[float, float] = (1e3, 1e15),
) -> Allocation:
    """Find the size that makes the best use of a budget.

    Args:
        loss: of parameters and tokens, as a fit expects it.
        flops: the budget.
        per_token: training FLOPs a token, of parameters.
        sizes: parameters of the smallest and the largest model to consider.

    Raises:
        ValueError: if the best size is at an end of ``sizes``, where it would not be
            a minimum.
    """

    def at(log_size: Any) -> Any:
        size = np.exp(log_size)
        return loss(size, flops / per_token(size))

    grid = np.log(np.geomspace(sizes[0], sizes[1], POINTS))
    losses = np.asarray(at(grid))
    best = int(np.nanargmin(losses))
    if best in (0, POINTS - 1):
        raise ValueError(
            f"flops={flops:g}: loss is least at the end of sizes={sizes}; widen it, or"
            " the law has no best size"
        )
    around = (grid[best - 1], grid[best + 1])
    end = minimize_scalar(at, bounds=around, method="bounded", options={"xatol": 1e-9})
    size = float(np.exp(end.x))
    return Allocation(flops, size, float(flops / per_token(size)), float(end.fun))


def frontier(loss: Loss, budgets: Iterable[float], **options: Any) -> list[Allocation]:
    """Allocate each of several budgets; ``options`` are those of ``allocate``."""
    return [allocate(loss, float(flops), **options) for flops in budgets]


def chinchilla_optimum(coefficients: Mapping[str, float], flops: float) -> Allocation:
    """Solve for the best size in closed form, at six FLOPs a parameter and token.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, Eq. 4.
    """
    names = ("E", "A", "alpha", "B", "beta")
    floor, a, alpha, b, beta = (coefficients[name] for name in names)
    steep = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    size = steep * (flops / 6) ** (beta / (alpha + beta))
    data = flops / 6 / size
    return Allocation(flops, size, data, floor + a / size**alpha + b / data**beta)


def valleys(table: Mapping[str, Any], *, digits: int = 2) -> list[Valley]:
    """Fit a parabola to each budget's losses; budgets are equal to ``digits`` digits.

    Budgets with fewer than three sizes, or whose losses do not curve upwards, have no
    valley and are left out.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, Sec. 3.2.
    """
    flops, sizes, losses = (
        np.asarray(table[k], float) for k in ("flops", "parameters", "loss")
    )
    place = 10.0 ** (np.floor(np.log10(flops)) - digits + 1)
    budgets = np.round(flops / place) * place
    found = []
    for budget in np.unique(budgets):
        same = budgets == budget
        x, y = np.log(sizes[same]), losses[same]
        if len(np.unique(x)) < 3:
            continue
        middle = x.mean()
        curve, slope, level = np.polyfit(x - middle, y, 2)
        if curve <= 0:
            continue
        bottom = middle - slope / (2 * curve)
        size, spent = float(np.exp(bottom)), float(np.mean(flops[same]))
        tokens = spent * float(np.mean(_tokens_each(table, same))) / size
        least = float(level - slope**2 / (4 * curve))
        inside = bool(x.min() < bottom < x.max())
        found.append(Valley(spent, size, tokens, least, float(2 * curve), inside))
    return found


def _tokens_each(table: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
    """Tokens times parameters over FLOPs: a sixth, unless the table knows better."""
    if "tokens" not in table:
        return np.full(1, 1 / 6)
    tokens, sizes, flops = (
        np.asarray(table[k], float)[rows] for k in ("tokens", "parameters", "flops")
    )
    return tokens * sizes / flops


def power_law(x: Any, y: Any) -> tuple[float, float]:
    """Fit ``y = factor x^exponent`` by least squares of logarithms; exponent first.

    Raises:
        ValueError: if there are fewer than two different ``x``.
    """
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(np.unique(x)) < 2:
        raise ValueError(f"{len(x)} points: a power law needs two different x")
    exponent, factor = np.polyfit(x, y, 1)
    return float(exponent), float(np.exp(factor))


def effective_size(
    coefficients: Mapping[str, float], *, parameters: float, experts: float | int
) -> float:
    """Give the parameters of the dense model that does as well as a routed one.

    Source: Clark et al. 2022, arXiv:2202.01169, Sec. 5.
    """
    a, b, c = (coefficients[name] for name in ("a", "b", "c"))
    first = coefficients["E_start"]
    last = 1 / coefficients["E_max"]
    many = np.log10(1 / (1 / (experts - 1 + 1 / (1 / first - last)) + last))
    one, size = np.log10(first), np.log10(parameters)
    gain = a * size + b * many + c * size * many - b * one
    return float(10 ** (gain / (a + c * one)))


def routing_cutoff(coefficients: Mapping[str, float]) -> float:
    """Give the size beyond which more experts no longer help.

    Source: Clark et al. 2022, arXiv:2202.01169, Sec. 5.
    """
    return float(10 ** (-coefficients["b"] / coefficients["c"]))


def size_multiplier(coefficients: Mapping[str, float], density: Any) -> Any:
    """Say how much larger a dense model is that does as well as a masked one.

    Both have as many non-zero parameters to begin with.

    Source: Frantar et al. 2023, arXiv:2309.08520, Sec. 3.
    """
    a, b, c = (coefficients[name] for name in ("a_S", "b_S", "c_S"))
    return ((a + c) / (a * density**b + c)) ** (1 / coefficients["b_N"])
