"""Fit a law to a table: Huber's loss on log loss, many starts, resampled intervals.

``fit(law, table) -> Fit``. A table maps names to equally long columns: those that the
law reads, and ``loss``. Everything runs in float64, on the CPU.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares, minimize

from sparsejax.scaling.laws import Law, Start

__all__ = ["Fit", "fit"]

GUESSES = 64  # drawn for each start that is followed
COVERAGE = 0.95  # of an interval
SQUARE = 1e6  # Huber's loss with so large a delta is the square of all that occurs
STEPS = 100  # over squares
ROUNDS = 12  # descents from one guess
SETTLED = 1e-9  # gain of a round, over the objective, after which there is no other
NOTHING = 1e-20  # an objective that is rounding error
DAMPING = 1e-12  # of a round's coordinates, over the largest curvature
_OPTIONS = {"maxiter": 60, "maxfun": 120, "maxcor": 8, "ftol": 1e-10, "gtol": 1e-8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with its coefficients, and how far it can be trusted."""

    law: Law
    coefficients: dict[str, float]
    fixed: tuple[str, ...]  # those that were given
    objective: float  # Huber's loss, averaged over the rows that were fitted
    error: float  # root mean square of log loss, over the rows that were fitted
    held_out_error: float | None  # and over those that were not
    residuals: np.ndarray  # log of measured over expected, every row
    intervals: dict[str, tuple[float, float]]  # empty if nothing was resampled

    def predict(self, table: Mapping[str, Any]) -> Any:
        """Give the expected loss at every row of a table, or at one point."""
        return self.law(self.coefficients, table)


def fit(
    law: Law,
    table: Mapping[str, Any],
    *,
    fixed: Mapping[str, float] | None = None,
    held_out: Sequence[bool] | np.ndarray | None = None,
    delta: float | None = 1e-3,
    starts: int = 16,
    bootstrap: int = 0,
    seed: int = 0,
) -> Fit:
    """Find the coefficients that expect the table's losses best.

    The best of many guesses are followed, over squares and then by L-BFGS over Huber's
    loss, with exact derivatives; intervals are those of refits to rows drawn again.

    Args:
        law: one of ``LAWS``, or another.
        table: columns by name, ``loss`` among them.
        held_out: rows that are judged by, and not fitted to.
        delta: of Huber's loss, in log loss; None for least squares.
        bootstrap: times that rows are drawn again; 0 for no intervals.

    Raises:
        ValueError: for a missing or ragged column, a loss that is not finite and
            positive, an unknown coefficient, or fewer rows than coefficients.
    """
    fixed = dict(fixed or {})
    columns, seen = _columns(law, table, fixed, held_out)
    free = {k: v for k, v in law.starts.items() if k not in fixed}
    with _float64(), np.errstate(all="ignore"):  # a search may leave the map
        problem = _Problem(law, columns, fixed, delta)
        random = np.random.default_rng(seed)
        rows, weights = int(seen.sum()), seen / seen.sum()
        guesses = problem.screened(_draw(free, starts * GUESSES, random), weights)
        ends = [problem.descend(guess, weights) for guess in guesses[:starts]]
        objective, best = min(ends, key=lambda end: end[0])
        draws = random.multinomial(rows, weights, size=bootstrap) / rows
        again = [problem.named(problem.descend(best, drawn)[1]) for drawn in draws]
        residuals, named = problem.residuals(best), problem.named(best)
    return Fit(
        law=law,
        coefficients=named,
        fixed=tuple(fixed),
        objective=objective,
        error=_rms(residuals[seen]),
        held_out_error=None if seen.all() else _rms(residuals[~seen]),
        residuals=residuals,
        intervals=_intervals(again, tuple(free)),
    )


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _intervals(
    again: list[dict[str, float]], names: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    tail = (1 - COVERAGE) / 2
    found = {}
    for name in names if again else ():
        low, high = np.quantile([x[name] for x in again], [tail, 1 - tail])
        found[name] = (float(low), float(high))
    return found


def _columns(
    law: Law, table: Mapping[str, Any], fixed: dict[str, float], held_out: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Check everything a caller can get wrong; give float columns and fitted rows."""
    unknown = [name for name in fixed if name not in law.starts]
    if unknown:
        raise ValueError(
            f"fixed={unknown[0]!r}: no such coefficient; one of {', '.join(law.starts)}"
        )
    names = (*law.variables, "loss")
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"no column {missing[0]!r}: this law reads {', '.join(names)};"
            f" the table has {', '.join(table)}"
        )
    columns = {name: np.atleast_1d(np.asarray(table[name], float)) for name in names}
    rows = len(columns["loss"])
    for name, column in columns.items():
        if column.shape != (rows,):
            raise ValueError(
                f"column {name!r} has shape {column.shape}: must be as long as 'loss',"
                f" ({rows},)"
            )
        wrong = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if wrong.size:
            raise ValueError(
                f"{name}={column[wrong[0]]} in row {wrong[0]}: must be finite and"
                " positive; leave out the runs that diverged"
            )
    seen = np.ones(rows, bool) if held_out is None else ~np.asarray(held_out, bool)
    if seen.shape != (rows,):
        raise ValueError(f"held_out has shape {seen.shape}: must be ({rows},)")
    free = len(law.starts) - len(fixed)
    if seen.sum() < free:
        raise ValueError(
            f"{seen.sum()} rows to fit {free} coefficients to: need at least one each;"
            " add runs, or give some coefficients by fixed={…}"
        )
    return columns, seen


def _draw(
    free: Mapping[str, Start], count: int, random: np.random.Generator
) -> np.ndarray:
    """Draw guesses, positive coefficients as their logarithms."""
    ends = np.array([_ends(start) for start in free.values()]).reshape(-1, 2)
    return random.uniform(ends[:, 0], ends[:, 1], (count, len(free)))


def _ends(start: Start) -> tuple[float, float]:
    tiny = np.finfo(float).tiny
    low, high = start.low, start.high
    if start.positive:
        return float(np.log(max(low, tiny))), float(np.log(high))
    return float(low), float(high)


class _Problem:
    """The objective over the free coefficients, compiled once for one table."""

    def __init__(
        self,
        law: Law,
        columns: Mapping[str, np.ndarray],
        fixed: Mapping[str, float],
        delta: float | None,
    ) -> None:
        self._fixed = {k: float(v) for k, v in fixed.items()}
        self._free = {k: v for k, v in law.starts.items() if k not in fixed}
        self._delta = SQUARE if delta is None else delta
        points = {k: jnp.asarray(columns[k]) for k in law.variables}
        measured = jnp.log(jnp.asarray(columns["loss"]))

        def residuals(x: Any) -> Any:
            return measured - jnp.log(law.formula(self._named(x), points))

        def objective(x: Any, weights: Any, delta: Any) -> Any:
            return jnp.sum(weights * _huber(residuals(x), delta))

        self._residuals = jax.jit(residuals)
        self._jacobian = jax.jit(jax.jacfwd(residuals))
        self._slope = jax.jit(jax.value_and_grad(objective))
        self._many = jax.jit(jax.vmap(objective, (0, None, None)))

    def _named(self, x: Any) -> dict[str, Any]:
        values = zip(self._free.items(), x, strict=True)
        found = {k: jnp.exp(v) if s.positive else v for (k, s), v in values}
        return self._fixed | found

    def named(self, x: np.ndarray) -> dict[str, float]:
        """Give all coefficients by name."""
        return {k: float(v) for k, v in self._named(x).items()}

    def residuals(self, x: np.ndarray) -> np.ndarray:
        """Give the log of measured over expected loss."""
        return np.asarray(self._residuals(x))

    def screened(self, guesses: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sort guesses, the best first."""
        scores = np.asarray(self._many(guesses, weights, SQUARE))
        return guesses[np.argsort(np.where(np.isfinite(scores), scores, np.inf))]

    def descend(self, x: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Follow a guess downhill; give the objective at the end, and the end.

        Squares come first: far away Huber's loss is nearly flat in all directions.
        """
        if x.size:
            root = np.sqrt(weights)
            x = least_squares(
                lambda x: self.residuals(x) * root,
                x,
                jac=lambda x: np.asarray(self._jacobian(x)) * root[:, None],  # pyright: ignore
                x_scale="jac",
                max_nfev=STEPS,
            ).x
            x = self._settle(x, weights)
        return self._value(x, weights)[0], x

    def _settle(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Descend in rounds, each in coordinates of its own.

        Coefficients of one term go together, which makes a narrow valley: coordinates
        in which it is round cost a small matrix and save hundreds of steps.
        """
        value = self._value(x, weights)[0]
        for _ in range(ROUNDS):
            axes = self._axes(x, weights)
            if axes is None or value < NOTHING:
                break

            end = minimize(
                self._moved,
                np.zeros_like(x),
                (x, axes, value, weights),
                jac=True,
                method="L-BFGS-B",
                options=_OPTIONS,
            )
            x = x + axes @ end.x
            if end.fun > 1 - SETTLED:
                break
            value *= float(end.fun)
        return x

    def _moved(
        self,
        y: np.ndarray,
        x: np.ndarray,
        axes: np.ndarray,
        scale: float,
        weights: np.ndarray,
    ) -> tuple[float, np.ndarray]:
        value, gradient = self._value(x + axes @ y, weights)
        return value / scale, axes.T @ gradient / scale

    def _value(self, x: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        found, gradient = self._slope(x, weights, self._delta)
        value, gradient = float(found), np.asarray(gradient)
        if not np.isfinite(value) or not np.isfinite(gradient).all():
            return 1e30, np.zeros_like(x)  # a step too far; the search comes back
        return value, gradient

    def _axes(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
        """Give axes along which the objective curves alike; None far off the map."""
        slopes, far = np.asarray(self._jacobian(x)), np.abs(self.residuals(x))
        pull = weights * np.minimum(1, self._delta / np.maximum(far, 1e-300))
        curve = slopes.T @ (slopes * pull[:, None])
        if not np.isfinite(curve).all():
            return None
        size, directions = np.linalg.eigh(curve)
        size = np.maximum(size, DAMPING * max(float(size.max()), 1e-300))
        # A step of one is then a fall by about the whole objective.
        value = self._value(x, weights)[0]
        return directions * np.sqrt(value / size)


def _huber(x: Any, delta: Any) -> Any:
    far = jnp.abs(x)
    return jnp.where(far <= delta, x**2 / 2, delta * (far - delta / 2))
