"""Figures of fits: ``(axes, fit, table) -> axes``, both axes labelled with units."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from sparsejax.scaling.fit import Fit
from sparsejax.scaling.frontier import Valley

__all__ = ["fit_curves", "residual_plot", "valley_plot"]

MARKERS = "osD^vP*X"
CURVE = 100  # points of it


def _groups(table: Mapping[str, Any], by: str | None) -> dict[Any, np.ndarray]:
    """Rows of each value of a column, in the order of their first appearance."""
    if by is None:
        return {"": np.ones(len(table["loss"]), bool)}
    column = np.asarray(table[by])
    return {value: column == value for value in dict.fromkeys(column.tolist())}


def _counts(axes: Axes) -> None:
    """Lay x out by its logarithm, with ticks at 1, 2 and 5."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def residual_plot(
    axes: Axes, fit: Fit, table: Mapping[str, Any], *, by: str | None = None
) -> Axes:
    """Measured over expected loss against the expected; the line is a perfect law.

    The band is one root mean square error of the rows that were fitted.
    """
    expected = fit.predict(table)
    for marker, (name, rows) in zip(
        MARKERS * 99, _groups(table, by).items(), strict=False
    ):
        off = 100 * np.expm1(fit.residuals[rows])
        axes.plot(
            expected[rows], off, marker, markersize=4, alpha=0.8, label=_name(name)
        )
    axes.axhspan(-100 * fit.error, 100 * fit.error, color="#E4E4E4", zorder=0)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xlabel("expected loss (nats per token)")
    axes.set_ylabel("measured above expected loss (%)")
    if by is not None:
        axes.legend(title=by)
    return axes


def fit_curves(
    axes: Axes, fit: Fit, table: Mapping[str, Any], *, x: str, by: str
) -> Axes:
    """Measured losses as points over one column, the law as a line for each group.

    A group's line keeps the other columns at its first row's values.
    """
    for marker, (name, rows) in zip(
        MARKERS * 99, _groups(table, by).items(), strict=False
    ):
        at = {k: np.asarray(table[k], float)[rows] for k in fit.law.variables}
        losses = np.asarray(table["loss"], float)[rows]
        points = axes.plot(at[x], losses, marker, markersize=4, label=_name(name))
        line = np.geomspace(at[x].min(), at[x].max(), CURVE)
        curve = {k: np.full(CURVE, column[0]) for k, column in at.items()} | {x: line}
        axes.plot(line, fit.predict(curve), color=points[0].get_color(), linewidth=1)
    _counts(axes)
    axes.set_xlabel(x)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(title=by)
    return axes


def valley_plot(
    axes: Axes, valleys: list[Valley], table: Mapping[str, Any], *, digits: int = 2
) -> Axes:
    """Losses over parameters at equal budgets, with their parabolas and bottoms."""
    flops = np.asarray(table["flops"], float)
    sizes, losses = (np.asarray(table[k], float) for k in ("parameters", "loss"))
    for valley in valleys:
        near = np.abs(flops / valley.flops - 1) < 10.0 ** (1 - digits)
        points = axes.plot(sizes[near], losses[near], "o", markersize=4)
        line = np.geomspace(sizes[near].min(), sizes[near].max(), CURVE)
        away = np.log(line / valley.parameters)
        curve = valley.loss + valley.curvature * away**2 / 2
        label = f"{valley.flops:.1e} FLOPs"
        color = points[0].get_color()
        axes.plot(line, curve, color=color, linewidth=1, label=label)
        axes.plot([valley.parameters], [valley.loss], "k*", markersize=7)
    _counts(axes)
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    return axes
