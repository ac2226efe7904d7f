"""How a tensor of a checkpoint lies, seen as one of ours.

A ``Tensor`` pairs a path of ours with a name of theirs. ``layout`` spells the axes as
they lie on disk, in the axis alphabet, merged ones in parentheses: a linear map of
heads is ``"(h c) d"`` there and ``"d h c"`` here. What the layout leaves out of our
axes is spread over names: ``{l}`` counts layers, ``{e}`` experts. A ``2`` holds two of
our parameters, of which this is number ``part``. Nothing is ever copied: ``ours`` is a
view, to read from or to write into.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Tensor", "disk_shape", "names_of", "ours"]

LAYER = "layer/"  # opens the paths that every layer has


class Tensor(NamedTuple):
    """A parameter of ours, and the tensors of a checkpoint that it is."""

    path: str  # as in ``tree``; ``layer/…`` inside a layer
    name: str
    layout: str
    part: int = 0


def _letters(layout: str) -> list[str]:
    return layout.replace("(", "").replace(")", "").split()


def disk_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Give the shape on disk, merged axes multiplied out."""
    sizes = {**sizes, "2": 2}
    groups = re.findall(r"\(([^)]*)\)|(\S+)", layout)
    return tuple(
        int(np.prod([sizes[x] for x in (many or one).split()])) for many, one in groups
    )


def ours(
    disk: np.ndarray, tensor: Tensor, axes: str, sizes: Mapping[str, int]
) -> np.ndarray:
    """See a tensor on disk with our axes, without those that names count.

    Args:
        disk: contiguous, of ``disk_shape``.
        axes: of our parameter, layers and experts included.
        sizes: of every letter, as on disk.
    """
    letters = _letters(tensor.layout)
    whole = disk.reshape([{**sizes, "2": 2}[x] for x in letters])
    if "2" in letters:
        at = letters.index("2")
        whole = whole[(slice(None),) * at + (tensor.part,)]
        letters = letters[:at] + letters[at + 1 :]
    order = [letters.index(x) for x in axes.split() if x in letters]
    return whole.transpose(order)


def names_of(
    tensor: Tensor, axes: str, layers: list[int], experts: int
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Give each name, with our indices of the axes that it counts.

    Args:
        axes: of our parameter.
        layers: of the model, in the order of our axis ``l``; empty outside of layers.
        experts: how many there are.
    """
    spread = "e" in axes.split() and "{e}" in tensor.name
    for at, layer in enumerate(layers or [0]):
        for expert in range(experts) if spread else (0,):
            index = (at,) * bool(layers) + (expert,) * spread
            yield (
                index,
                tensor.name.replace("{l}", str(layer)).replace("{e}", str(expert)),
            )
