"""Pictures of masks: what is live, and how that changes.

A picture is a matrix of densities: a mask, its heads and their width one side, averaged
over at most ``CELLS`` cells along each side.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsejax.masked.plan import depth
from sparsejax.partition import replicated
from sparsejax.train.plots import (
    Table,
    column,
    evenly,
    grid,
    legend_beside,
    named,
    over_steps,
)
from sparsejax.typing import Array, Float

__all__ = [
    "changes_figure",
    "draw_changes",
    "draw_mask",
    "drawn",
    "masks_figure",
    "pictures",
]

CELLS = 96
CHANGES = {
    "masked/flip_rate": "weights that flip in a step",
    "masked/dead_units": "outputs without a live input",
    "masked/overlap": "first mask that is still live",
    "masked/explored": "weights that were ever live",
}


def pictures(
    masks: Mapping[str, Any],
) -> dict[str, Float[Array, "layers rows columns"]]:
    """Draw the masks of every layer coarsely, as arrays; may be compiled."""
    return {
        path: _picture(mask[...], mask.axes.split()) for path, mask in masks.items()
    }


def draw_mask(axes: Axes, picture: np.ndarray, *, name: str = "") -> Axes:
    """Draw a picture of a mask: white is dead, dark is live."""
    axes.imshow(picture, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    axes.set_title(f"{name}\n{np.mean(picture):.0%} live".strip())
    axes.set_xlabel("output")
    axes.set_ylabel("input")
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def draw_changes(axes: Axes, table: Table) -> Axes:
    """Draw how much of the masks changes, is dead, is as at first and was ever live."""
    for name in (name for name in CHANGES if named(table, name)):
        seen = column(table, name)
        axes.plot(seen.steps, seen.values, label=CHANGES[name])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share")
    legend_beside(axes, 2, None)
    return over_steps(axes)


def masks_figure(found: Mapping[str, np.ndarray]) -> Figure | None:
    """Draw some layers of every parameter, the first and the last among them."""
    layers = {
        f"{path} {index}" if len(stack) > 1 else path: picture
        for path, stack in found.items()
        for index, picture in enumerate(np.asarray(stack))
    }
    if not layers:
        return None
    shown = [list(layers)[i] for i in evenly(len(layers))]
    rows, columns = grid(len(shown))
    figure = Figure(figsize=(0.4 + 2.9 * columns, 0.4 + 2.7 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(panels.flat, shown, strict=False):
        draw_mask(axes, layers[name], name=name)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    return figure


def changes_figure(table: Table) -> Figure | None:
    """Draw the changes, if the run has masks."""
    if not named(table, "masked/flip_rate"):
        return None
    figure = Figure(figsize=(6.4, 3.6))
    draw_changes(figure.subplots(), table)
    return figure


def _picture(mask: Array, letters: list[str]) -> Array:
    first = depth(letters)
    inner = letters[first:]
    heads = inner[:2] in (["h", "c"], ["g", "c"]) and len(inner) > 2
    inputs = int(np.prod(mask.shape[first : first + (2 if heads else 1)]))
    matrix = mask.reshape(int(np.prod(mask.shape[:first])), inputs, -1)
    left, right = (_averages(n) for n in matrix.shape[1:])
    return left @ matrix.astype(jnp.float32) @ right.T


def _averages(count: int) -> Float[Array, "cells count"]:
    cells = min(count, CELLS)
    cell = np.arange(count) * cells // count
    near = (cell == np.arange(cells)[:, None]).astype(np.float32)
    return jnp.asarray(near / near.sum(1, keepdims=True))


def drawn(masks: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Compute the pictures where the masks are; the same on every process."""
    return jax.tree.map(np.asarray, replicated(pictures)(dict(masks)))
