"""Masked dense layers: train any model while most of its weights are exactly 0.

A plan is one member of each of six tables. ``sparse(tx, plan)`` turns any optax
transformation into one that keeps masks, ``effective`` gives the weights to compute
with. Masks save parameters, not time: a masked matrix product is executed densely,
unless the plan has masks of blocks and computes with those (``products="blocks"``).
"""

from sparsejax.masked.allocations import (
    Layer,
    by_grasp,
    by_momentum,
    by_path,
    er,
    erk,
    global_,
    snip,
    uniform,
)
from sparsejax.masked.block_sparse import BlockSparse, block_sparse_matmul
from sparsejax.masked.blocked import Blocked
from sparsejax.masked.candidates import gumbel, learned
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.criteria import (
    Evidence,
    fisher,
    gradient,
    grasp,
    magnitude,
    momentum,
    movement,
    random,
    saliency,
)
from sparsejax.masked.estimators import (
    Now,
    exponential_mask_decay,
    mask_decay,
    masked,
    soft_threshold,
    sr_ste,
    straight_through,
    top_kast,
)
from sparsejax.masked.evidence import Measured, measure, measures
from sparsejax.masked.fan_in import FanIn
from sparsejax.masked.kept import clock, horizon
from sparsejax.masked.metrics import Cost, cost, metrics
from sparsejax.masked.optimizer import (
    Mask,
    SparseState,
    effective,
    masks_of,
    sparse,
    tracked_of,
)
from sparsejax.masked.schedules import (
    Ramp,
    ac_dc,
    constant,
    cubic,
    geometric,
    halving,
    one_shot,
    window,
)
from sparsejax.masked.structures import (
    Block,
    CoarseToFine,
    ConstantFanIn,
    NOfM,
    Structure,
    Unstructured,
    column,
    heads,
    row,
)
from sparsejax.masked.tiles import Butterfly, Transposable
from sparsejax.masked.updaters import (
    Rule,
    prune,
    prune_and_grow,
    rigl,
    select,
    set_,
    sparse_momentum,
    srigl,
    static,
)

# What a mask may look like: arguments in, (scores, keep) -> mask out.
STRUCTURES = {
    "unstructured": Unstructured,
    "n_of_m": NOfM,
    "coarse_to_fine": CoarseToFine,
    "transposable": Transposable,
    "constant_fan_in": ConstantFanIn,
    "block": Block,
    "row": row,
    "column": column,
    "heads": heads,
    "butterfly": Butterfly,
}
# What a weight is worth: Evidence -> scores.
CRITERIA = {
    "magnitude": magnitude,
    "random": random,
    "saliency": saliency,
    "gradient": gradient,
    "momentum": momentum,
    "fisher": fisher,
    "movement": movement,
    "grasp": grasp,
}
# How much of the density each layer gets: (layers, density, ...) -> densities.
ALLOCATIONS = {
    "uniform": uniform,
    "er": er,
    "erk": erk,
    "by_path": by_path,
    "global": global_,
    "snip": snip,
    "grasp": by_grasp,
    "momentum": by_momentum,
}
# How dense when: (step, ramp) -> density.
SCHEDULES = {
    "constant": constant,
    "one_shot": one_shot,
    "cubic": cubic,
    "geometric": geometric,
    "halving": halving,
    "ac_dc": ac_dc,
}
# What the model computes with: (weight, mask, now) -> weight, with its gradient.
ESTIMATORS = {
    "masked": masked,
    "straight_through": straight_through,
    "sr_ste": sr_ste,
    "mask_decay": mask_decay,
    "exponential_mask_decay": exponential_mask_decay,
    "soft_threshold": soft_threshold,
    "top_kast": top_kast,
    "gumbel": gumbel,
}
# How masks change: (mask, Evidence, rule) -> mask.
UPDATERS = {
    "static": static,
    "prune": prune,
    "select": select,
    "set": set_,
    "rigl": rigl,
    "srigl": srigl,
    "sparse_momentum": sparse_momentum,
    "learned": learned,
}
# These move weights even when the density stays.
GROWING = (set_, rigl, srigl, sparse_momentum)
# These judge the gradient of the weights before the step, and take its place.
REPLACES_STEP = (rigl, srigl)
# These allocations rank the units of all layers together; None: by the criterion.
RANKED_BY = {global_: None, snip: saliency, by_grasp: grasp}
# These share out over the layers what is dropped, by the mean of a score.
SHARED_BY = {by_momentum: momentum}
STEADY = ("constant",)  # schedules under which the density stays
# What a member looks at beside weights and gradients.
NEEDS = {
    momentum: "momentum",
    fisher: "variance",
    movement: "movement",
    grasp: "curvature",
    by_momentum: "momentum",
    sparse_momentum: "momentum",
}
# What these judge by is known before the first step only if it is measured.
MEASURED = {gradient: "gradient", saliency: "gradient", grasp: "curvature"}
# What executes products with masked weights, and which members each is for; an empty
# one is for all.
PRODUCTS: dict[str, dict[str, tuple[str, ...]]] = {
    "dense": {},
    "blocks": {
        "structure": ("block", "butterfly"),
        "estimator": ("masked",),
        "updater": ("static", "prune", "select", "set", "rigl"),
        "criterion": tuple(x for x, y in CRITERIA.items() if y is not movement),
    },
}
# What a member works with, where that is not everything.
PARTNERS = {
    grasp: {"updater": ("static",)},
    by_grasp: {"updater": ("static",)},
    srigl: {"structure": ("constant_fan_in",)},
    learned: {
        "structure": ("n_of_m",),
        "estimator": ("gumbel",),
        "schedule": STEADY,
    },
    gumbel: {"updater": ("learned",)},
    soft_threshold: {"structure": ("unstructured", "n_of_m", "constant_fan_in")},
    top_kast: {"updater": ("select",)},
    Butterfly: {"updater": ("static", "select")},
    # What is dead in one frame may be live in the next, so its weight is stored.
    CoarseToFine: {
        "updater": ("select",),
        "estimator": (
            "straight_through",
            "sr_ste",
            "mask_decay",
            "exponential_mask_decay",
        ),
    },
}
# The least and most that an argument of a member may be; None: any finite number.
RANGES: dict[object, dict[str, tuple[int, int | None]]] = {
    NOfM: {"m": (1, None)},
    CoarseToFine: {"m": (1, None), "frames": (2, None)},
    Transposable: {"m": (1, 4)},
    Block: {"power": (1, None)},
    Butterfly: {"block": (1, None)},
    erk: {"power": (0, None)},
    sr_ste: {"decay": (0, None)},
    exponential_mask_decay: {"rate": (0, None)},
    top_kast: {"backward": (0, 1), "decay": (0, None)},
    srigl: {"salient": (0, 1)},
    learned: {"rate": (0, None), "prior": (0, None), "reward": (0, None)},
}

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "ESTIMATORS",
    "PRODUCTS",
    "SCHEDULES",
    "STRUCTURES",
    "UPDATERS",
    "BlockSparse",
    "Blocked",
    "Cost",
    "Evidence",
    "FanIn",
    "Layer",
    "Mask",
    "MaskedConfig",
    "Measured",
    "Now",
    "Ramp",
    "Rule",
    "SparseState",
    "Structure",
    "block_sparse_matmul",
    "clock",
    "cost",
    "effective",
    "horizon",
    "masks_of",
    "measure",
    "measures",
    "metrics",
    "prune_and_grow",
    "sparse",
    "tracked_of",
    "window",
]
