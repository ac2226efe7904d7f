"""Allocations: the density of each layer, given the density of all of them together.

Every allocation has the signature ``(layers, density, **arguments) -> densities`` from
and to dicts by path. Layers that are stacked in one parameter have one density.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from sparsejax.config import near

__all__ = ["Layer", "by_path", "erk", "uniform"]


class Layer(NamedTuple):
    """The weights that share one mask, and how many such layers are stacked."""

    shape: tuple[int, ...]
    copies: int = 1

    @property
    def size(self) -> int:
        """Count the weights of one copy."""
        return math.prod(self.shape)


def uniform(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Give every layer the same density."""
    return dict.fromkeys(layers, density)


def erk(
    layers: Mapping[str, Layer], density: float, *, power: float = 1.0
) -> dict[str, float]:
    """Let density fall with size: proportional to the sum over the product of sides.

    Whatever would be denser than dense is dense, and the others share what is left.

    Source: Evci et al. 2019, arXiv:1911.11134, Sec. 3 (1).

    Args:
        layers: by path.
        density: of all weights together.
        power: of the ratio; 0 is uniform.
    """
    ratio = {p: (sum(x.shape) / x.size) ** power for p, x in layers.items()}
    weights = {p: x.size * x.copies for p, x in layers.items()}
    total = density * sum(weights.values())
    dense: set[str] = set()
    while True:
        rest = [p for p in layers if p not in dense]
        share = total - sum(weights[p] for p in dense)
        raw = sum(ratio[p] * weights[p] for p in rest)
        scale = share / raw if rest else 0.0
        over = {p for p in rest if scale * ratio[p] > 1}
        if not over:
            return {p: 1.0 if p in dense else scale * ratio[p] for p in layers}
        dense |= over


def by_path(
    layers: Mapping[str, Layer], density: float, *, densities: Mapping[str, float]
) -> dict[str, float]:
    """Give every layer the density of the first regex that its path matches.

    Raises:
        ValueError: if a regex matches no path.
    """
    for pattern in densities:
        if not any(re.search(pattern, path) for path in layers):
            raise ValueError(
                f"{pattern!r} matches no masked path{near(pattern, layers)}"
            )
    return {
        path: next((d for p, d in densities.items() if re.search(p, path)), density)
        for path in layers
    }
