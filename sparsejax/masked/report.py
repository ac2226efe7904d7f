"""What each masked layer costs: what it holds, what it needs, and what is executed.

Parameters, non-zero ones, bytes, useful FLOPs and executed FLOPs are counted; time is
measured by whoever asks. They are different numbers, and only the last two say whether
anything is saved while computing: a layer that executes the dense product gives no
speed-up, whatever its mask leaves out, and ``speedup`` says so.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sparsejax import masked, tree
from sparsejax.masked.blocked import FULL
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.plan import Target, layer_of, targets
from sparsejax.typing import PyTree

__all__ = ["LayerCost", "layer_costs"]

ID = 4  # bytes of an index


class LayerCost(NamedTuple):
    """Costs of one parameter, summed over the layers that it stacks.

    >>> mask = LayerCost("up", (64, 64), 1, 4096, 409, 16384, 2148, 818.0, 8192.0)
    >>> mask.useful_flops / mask.executed_flops < 0.1  # and yet no faster
    True
    """

    path: str
    matrix: tuple[int, ...]  # sides of one layer
    layers: int
    parameters: int
    nonzero: int
    bytes_dense: int  # stored with its zeros
    bytes_sparse: int  # live values, and where they are
    useful_flops: float  # of one row, forward
    executed_flops: float
    seconds: float | None = None  # measured, of one layer
    dense_seconds: float | None = None

    @property
    def speedup(self) -> float:
        """How many times faster than its dense product the layer was measured to be.

        Raises:
            ValueError: if it executes the dense product, or was not measured.
        """
        dense = 2 * self.parameters
        if self.executed_flops >= dense:
            raise ValueError(
                f"{self.path}: a mask is no speed-up: all {dense} FLOPs of the dense"
                f" product are executed, {self.useful_flops:.0f} of them useful; take"
                " masks of blocks and products='blocks', or a smaller model"
            )
        if self.seconds is None or self.dense_seconds is None:
            raise ValueError(
                f"{self.path}: fewer FLOPs are no speed-up until they are measured"
            )
        return self.dense_seconds / self.seconds


def layer_costs(
    params: PyTree, masks: Mapping[str, Any], plan: MaskedConfig
) -> list[LayerCost]:
    """Count what each masked parameter costs with these masks.

    Raises:
        ValueError: if a mask has no parameter that the plan masks.
    """
    found, arrays = targets(params, plan), tree.leaves(params)
    costs = []
    for path, variable in masks.items():
        if path not in found:
            raise ValueError(f"the plan masks no {path!r}; give the plan of the masks")
        target, mask = found[path], np.asarray(variable[...])
        sides = layer_of(mask.shape, target.axes.split()).shape
        live, width = int(mask.sum()), arrays[path].dtype.itemsize
        costs.append(
            LayerCost(
                path=path,
                matrix=sides,
                layers=math.prod(target.stack),
                parameters=mask.size,
                nonzero=live,
                bytes_dense=mask.size * width,
                bytes_sparse=live * width + _index_bytes(target, mask),
                useful_flops=2.0 * live,
                executed_flops=_executed(plan, target, mask),
            )
        )
    return costs


def _index_bytes(target: Target, mask: np.ndarray) -> int:
    """Bytes that say where the live weights are, in the way their structure allows."""
    structure: Any = target.structure
    live = int(mask.sum())
    if hasattr(structure, "sides"):
        return live // math.prod(structure.sides) * 2 * ID
    if isinstance(structure, masked.STRUCTURES["n_of_m"]):  # its place in its group
        return math.ceil(live * math.log2(structure.m) / 8)
    return min(math.ceil(mask.size / 8), live * ID)  # a bit for each, or an index


def _executed(plan: MaskedConfig, target: Target, mask: np.ndarray) -> float:
    """FLOPs of one row: of live blocks where products are theirs, else of all."""
    if not masked.PRODUCTS[plan.products]:
        return 2.0 * mask.size
    each = mask.reshape(math.prod(target.stack), -1).sum(1)
    return float(sum(2 * (x if x <= FULL * target.size else target.size) for x in each))
