"""Allocations: the density of each layer, given the density of all of them together.

Every allocation has the signature ``(layers, density, **arguments) -> densities`` from
and to dicts by path. Layers that are stacked in one parameter have one density.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sparsejax.config import near
from sparsejax.tree import longest_match

__all__ = [
    "Layer",
    "by_grasp",
    "by_momentum",
    "by_path",
    "er",
    "erk",
    "global_",
    "matching",
    "snip",
    "uniform",
]


class Layer(NamedTuple):
    """The weights that share one mask, and how many such layers are stacked."""

    shape: tuple[int, ...]
    copies: int = 1

    @property
    def size(self) -> int:
        """Count the weights of one copy."""
        return math.prod(self.shape)


def uniform(
    layers: Mapping[str, Layer], density: float, *, dense: tuple[str, ...] = ()
) -> dict[str, float]:
    """Give every layer the same density, but for those that stay dense.

    Raises:
        ValueError: if the density cannot be met beside those that stay dense.
    """
    if not dense:
        return dict.fromkeys(layers, density)
    return erk(layers, density, power=0.0, dense=dense)


def er(
    layers: Mapping[str, Layer], density: float, *, dense: tuple[str, ...] = ()
) -> dict[str, float]:
    """Let density fall with fan-in and fan-out only, whatever a kernel spans.

    Proportional to the sum over the product of the last two sides; of a matrix, ``erk``
    is the same.

    Source: Mocanu et al. 2018, arXiv:1707.04780, Eq. 1.

    Raises:
        ValueError: if the density cannot be met beside those that stay dense.
    """
    flat = {p: Layer(x.shape[-2:]) for p, x in layers.items()}
    ratio = {p: sum(x.shape) / x.size for p, x in flat.items()}
    return _proportional(layers, ratio, density, dense)


def erk(
    layers: Mapping[str, Layer],
    density: float,
    *,
    power: float = 1.0,
    dense: tuple[str, ...] = (),
) -> dict[str, float]:
    """Let density fall with size: proportional to the sum over the product of sides.

    Whatever would be denser than dense is dense, and the others share what is left.

    Source: Evci et al. 2019, arXiv:1911.11134, Sec. 3 (1); Liu et al. 2022,
    arXiv:2202.02643, Sec. 3.

    Args:
        layers: by path.
        density: of all weights together.
        power: of the ratio; 0 is uniform.
        dense: regexes of paths that stay dense, a first or a last layer say.

    Raises:
        ValueError: if the density cannot be met beside those that stay dense.
    """
    ratio = {p: (sum(x.shape) / x.size) ** power for p, x in layers.items()}
    return _proportional(layers, ratio, density, dense)


def _proportional(
    layers: Mapping[str, Layer],
    ratio: Mapping[str, float],
    density: float,
    dense: tuple[str, ...],
) -> dict[str, float]:
    """Share out what is not dense by a ratio; what would be denser than dense is."""
    weights = {p: x.size * x.copies for p, x in layers.items()}
    total = density * sum(weights.values())
    full = matching(layers, dense)
    if dense and total <= sum(weights[p] for p in full):
        share = sum(weights[p] for p in full) / sum(weights.values())
        raise ValueError(
            f"density={density}: what dense={dense} keeps whole is {share:.3g} of the"
            " weights already; raise the density, or keep less of them dense"
        )
    while True:
        rest = [p for p in layers if p not in full]
        share = total - sum(weights[p] for p in full)
        raw = sum(ratio[p] * weights[p] for p in rest)
        scale = share / raw if rest else 0.0
        over = {p for p in rest if scale * ratio[p] > 1}
        if not over:
            return {p: 1.0 if p in full else scale * ratio[p] for p in layers}
        full |= over


def matching(layers: Mapping[str, Layer], patterns: Iterable[str]) -> set[str]:
    """Find the layers whose path matches a regex.

    Raises:
        ValueError: if one matches none, or is no regex.
    """
    for pattern in (patterns := tuple(patterns)):
        try:
            found = [path for path in layers if re.search(pattern, path)]
        except re.error as error:
            raise ValueError(
                f"{pattern!r} must be a regular expression ({error})"
            ) from None
        if not found:
            raise ValueError(
                f"{pattern!r} matches no masked path{near(pattern, layers)}"
            )
    return {p for p in layers if any(re.search(x, p) for x in patterns)}


def by_path(
    layers: Mapping[str, Layer], density: float, *, densities: Mapping[str, float]
) -> dict[str, float]:
    """Give every layer the density of the longest regex that its path matches.

    Raises:
        ValueError: if a regex matches no path, or a density is not in (0, 1].
    """
    matching(layers, densities)
    for pattern, given in densities.items():
        if not 0 < given <= 1:
            raise ValueError(f"densities[{pattern!r}]={given}: must be in (0, 1]")
    return {path: longest_match(densities, path, density) for path in layers}


def global_(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Let one ranking by the plan's criterion, over all layers, decide."""
    return uniform(layers, density)


def snip(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Let one ranking by saliency decide, whatever the layers themselves are ranked by.

    Source: Lee et al. 2018, arXiv:1810.02340, Alg. 1.
    """
    return uniform(layers, density)


def by_grasp(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Let one ranking by what gradient flow would be lost decide; before step 0 only.

    Source: Wang et al. 2020, arXiv:2002.07376, Alg. 1.
    """
    return uniform(layers, density)


def by_momentum(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Let what is dropped anywhere grow in proportion to the mean momentum of layers.

    Source: Dettmers and Zettlemoyer 2019, arXiv:1907.04840, Sec. 3. Departure: every
    layer drops the same share of its weights; what grows is a whole number by largest
    remainders, so the sum is exact.
    """
    return uniform(layers, density)
