"""What masks look like while they train, and what they cost.

``metrics`` is for the compiled step: arrays of fixed shapes. ``cost`` counts in Python
integers, once. A mask saves parameters and bytes of storage; the executed FLOPs of a
masked matrix product are those of the dense one, so no speed is claimed here.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax import tree
from sparsejax.masked.plan import depth
from sparsejax.typing import Array, PyTree

__all__ = ["Cost", "cost", "metrics"]


class Cost(NamedTuple):
    """Parameters and bytes of a masked model."""

    total: int  # all parameters
    nonzero: int  # those that a mask leaves, and all that have none
    bytes_dense: int  # stored with their zeros
    bytes_sparse: int  # live values, and one bit a weight for where they are


def metrics(
    masks: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    *,
    first: Mapping[str, Any] | None = None,
    ever: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Give the density of everything masked, of each path and of each layer in it.

    Also the share of dead units: outputs that no live weight leads to. With ``before``,
    masks of an earlier step, the flip rate, the share of weights whose mask differs;
    and ``sad``, the same as a share of the live ones. With ``first``, how much of the
    first masks is still live; with ``ever``, what share of all weights ever was.

    Source: Hu et al. 2024, arXiv:2404.01847, Sec. 4.1; Zhou et al. 2021,
    arXiv:2102.04010, Sec. 3.2; Liu et al. 2021, arXiv:2102.02887, Sec. 3.
    """
    found = {"masked/density": _mean(masks)}
    for path, mask in masks.items():
        found[f"masked/density/{path}"] = _by_layer(mask)
    dead = {path: _dead_units(mask) for path, mask in masks.items()}
    found["masked/dead_units"] = _mean(dead)
    if before is not None:
        flips = {p: _flips(mask, before[p]) for p, mask in masks.items()}
        found["masked/flip_rate"] = _mean(flips)
        for path, mask in masks.items():
            found[f"masked/flip_rate/{path}"] = _by_layer(mask, flips[path])
        found["masked/sad"] = found["masked/flip_rate"] / found["masked/density"]
    if first is not None:
        both = {p: mask[...] & first[p][...] for p, mask in masks.items() if p in first}
        found["masked/overlap"] = _mean(both) / _mean(first)
    if ever is not None:
        found["masked/explored"] = _mean(ever)
    return found


def cost(params: PyTree, masks: Mapping[str, Any]) -> Cost:
    """Count what a model with these masks stores.

    Raises:
        ValueError: if a mask has no parameter of its shape.
    """
    arrays = tree.leaves(params)
    for path, mask in masks.items():
        if path not in arrays or arrays[path].shape != mask.shape:
            raise ValueError(
                f"no parameter {path!r} of shape {mask.shape} for its mask"
            )
    live = {p: int(np.sum(np.asarray(m[...]))) for p, m in masks.items()}
    total = nonzero = dense = sparse = 0
    for path, x in arrays.items():
        kept = live[path] if path in masks else x.size
        width, index = x.dtype.itemsize, math.ceil(x.size / 8) * (path in masks)
        total, nonzero = total + x.size, nonzero + kept
        dense, sparse = dense + x.size * width, sparse + kept * width + index
    return Cost(total, nonzero, dense, sparse)


def _mean(values: Mapping[str, Any]) -> Array:
    live = sum(jnp.sum(x[...], dtype=jnp.float32) for x in values.values())
    return live / jnp.float32(sum(x.size for x in values.values()))


def _dead_units(mask: Any) -> Array:
    """Mark outputs without a live input; heads and their width are one axis of them."""
    letters = getattr(mask, "axes", "").split()
    start = depth(letters)
    inner = letters[start:]
    heads_in = inner[:2] in (["h", "c"], ["g", "c"]) and len(inner) > 2
    inputs = (start, start + 1) if heads_in else (start,)
    return ~jnp.any(mask[...], axis=inputs)


def _flips(mask: Any, before: Any) -> Array:
    return mask[...] != before[...]


def _by_layer(mask: Any, values: Any = None) -> Array:
    """Average over all but the axes that stack layers."""
    values = mask[...] if values is None else values
    first = depth(getattr(mask, "axes", "").split())
    return jnp.mean(values, axis=tuple(range(first, values.ndim)), dtype=jnp.float32)
