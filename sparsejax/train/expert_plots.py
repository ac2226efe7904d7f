"""Pictures of experts: which are visited together, and by whom."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

__all__ = ["draw_co_activation", "draw_specialisation"]


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
    if labels:
        axes.set_yticks(range(len(labels)), labels)
    axes.figure.colorbar(image, ax=axes, label="share of visits")
    return axes
