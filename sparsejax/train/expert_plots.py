"""Pictures of experts: which are visited together, by whom, and for how long."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsejax.train.plots import (
    Table,
    column,
    evenly,
    grid,
    legend_beside,
    named,
    over_steps,
)

__all__ = ["draw_co_activation", "draw_layers", "draw_specialisation", "figures"]


def draw_co_activation(axes: Axes, shares: np.ndarray) -> Axes:
    """Draw the share of each expert's tokens that visit each other expert too.

    Args:
        shares: as ``sparsejax.moe.measures.co_activation`` gives it.
    """
    others = np.array(shares, float)
    np.fill_diagonal(others, np.nan)
    image = axes.imshow(others, vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel("also visits expert")
    axes.set_ylabel("of the tokens of expert")
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label="share")
    return axes


def draw_specialisation(
    axes: Axes, shares: np.ndarray, labels: Sequence[str] = ()
) -> Axes:
    """Draw the share of each label's visits that go to each expert.

    Args:
        shares: as ``sparsejax.moe.measures.specialisation`` gives it.
        labels: names of the rows; their numbers if there are none.
    """
    image = axes.imshow(np.asarray(shares), vmin=0, aspect="auto", cmap="viridis")
    axes.set_xlabel("expert")
    axes.grid(False)
    if labels:
        # Text with dollars in it is no mathematics.
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.figure.colorbar(image, ax=axes, label="share of visits")
    return axes


def draw_layers(axes: Axes, steps: Sequence[int], values: np.ndarray) -> Axes:
    """Draw a share over steps, a line for each layer that has experts.

    Args:
        values: first axis: steps.
    """
    layers = np.asarray(values).T
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(layers)))
    for layer, color in enumerate(colors):
        label = f"MoE layer {layer}"
        axes.plot(steps, layers[layer], color=color, marker="o", ms=3, label=label)
    axes.set_ylim(0, 1.05)
    return over_steps(axes)


def figures(found: Mapping[str, Any]) -> dict[str, Callable[[Table], Figure | None]]:
    """Give a run's figures of its experts by file name, each made from its table.

    Args:
        found: what ``Routes.summed`` gives; nothing for a run without experts.
    """
    if not found:
        return {}
    return {
        "expert_changes": partial(_changes, found["saturation"]),
        "co_activation": _panels(draw_co_activation, found["co_activation"]),
        "token_experts": _panels(
            partial(draw_specialisation, labels=found["tokens"]),
            found["by_token"],
            "token",
        ),
        "position_experts": _panels(
            partial(draw_specialisation, labels=found["positions"]),
            found["by_position"],
            "position in the document",
        ),
    }


def _panels(
    draw: Callable[[Axes, np.ndarray], Axes], layers: np.ndarray, label: str = ""
) -> Callable[[Table], Figure]:
    """Draw a matrix of each layer, or of some, the first and the last among them."""

    def made(_: Table) -> Figure:
        shown = evenly(len(layers))
        rows, columns = grid(len(shown))
        figure = Figure(figsize=(0.4 + 3.4 * columns, 0.4 + 2.9 * rows))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, layer in zip(panels.flat, shown, strict=False):
            draw(axes, layers[layer]).set_title(f"MoE layer {layer}")
            if label:
                axes.set_ylabel(label)
        for axes in panels.flat[len(shown) :]:
            axes.set_axis_off()
        return figure

    return made


def _changes(saturation: Mapping[int, np.ndarray], table: Table) -> Figure | None:
    """Draw churn between evaluations, and how much of the end was there before."""
    if not named(table, "moe/churn") or not saturation:
        return None
    figure = Figure(figsize=(6.4, 5.6))
    above, below = figure.subplots(2, 1, sharex=True)
    seen = column(table, "moe/churn")
    draw_layers(above, seen.steps.tolist(), seen.values)
    above.set_ylabel("tokens that changed experts\nsince the evaluation before")
    draw_layers(below, [*saturation], np.array([*saturation.values()]))
    below.set_ylabel("visits of the last evaluation\nthat were made already")
    legend_beside(above, seen.values.shape[1], None)
    above.label_outer()
    return figure
