"""Masked dense layers: train any model while most of its weights are exactly 0.

A plan is one member of each of six tables. ``sparse(tx, plan)`` turns any optax
transformation into one that keeps masks, ``effective`` gives the weights to compute
with. Masks save parameters, not time: a masked matrix product is executed densely.
"""

from sparsejax.masked.allocations import Layer, by_path, erk, uniform
from sparsejax.masked.block_sparse import BlockSparse, block_sparse_matmul
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.criteria import Evidence, gradient, magnitude, random, saliency
from sparsejax.masked.estimators import masked, sr_ste, straight_through
from sparsejax.masked.metrics import Cost, cost, metrics
from sparsejax.masked.optimizer import (
    Mask,
    SparseState,
    effective,
    masks_of,
    sparse,
)
from sparsejax.masked.schedules import (
    Ramp,
    ac_dc,
    constant,
    cubic,
    geometric,
    one_shot,
)
from sparsejax.masked.structures import Block, NOfM, Structure, Unstructured
from sparsejax.masked.updaters import (
    Rule,
    prune,
    prune_and_grow,
    rigl,
    select,
    set_,
    static,
)

# What a mask may look like: arguments in, (scores, keep) -> mask out.
STRUCTURES = {"unstructured": Unstructured, "n_of_m": NOfM, "block": Block}
# What a weight is worth: Evidence -> scores.
CRITERIA = {
    "magnitude": magnitude,
    "random": random,
    "saliency": saliency,
    "gradient": gradient,
}
# How much of the density each layer gets: (layers, density, ...) -> densities.
ALLOCATIONS = {"uniform": uniform, "erk": erk, "by_path": by_path}
# How dense when: (step, ramp) -> density.
SCHEDULES = {
    "constant": constant,
    "one_shot": one_shot,
    "cubic": cubic,
    "geometric": geometric,
    "ac_dc": ac_dc,
}
# What the model computes with: (weight, mask) -> weight, with its gradient.
ESTIMATORS = {
    "masked": masked,
    "straight_through": straight_through,
    "sr_ste": sr_ste,
}
# How masks change: (mask, Evidence, rule) -> mask.
UPDATERS = {
    "static": static,
    "prune": prune,
    "select": select,
    "set": set_,
    "rigl": rigl,
}
GROWING = (set_, rigl)  # these move weights even when the density stays
REPLACES_STEP = (rigl,)  # these judge the gradient of the weights before the step

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "ESTIMATORS",
    "SCHEDULES",
    "STRUCTURES",
    "UPDATERS",
    "BlockSparse",
    "Cost",
    "Evidence",
    "Layer",
    "Mask",
    "MaskedConfig",
    "Ramp",
    "Rule",
    "SparseState",
    "Structure",
    "block_sparse_matmul",
    "cost",
    "effective",
    "masks_of",
    "metrics",
    "prune_and_grow",
    "sparse",
]
