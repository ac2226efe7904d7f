"""The dense baseline under masks: a published method by name, or gradual magnitude.

    python train.py --config=configs/masked.py
    python train.py --config=configs/masked.py:rigl

Every method is one plan: a member of each of the six tables of ``sparsejax.masked``,
with its numbers. Without a name, half of the weights are pruned along a cubic. A few
minutes on two CPU cores; results/comparison.csv has the figures to expect.

The two methods of blocks have wider layers than the baseline, and compute with their
live blocks: compare them with ``--config.masked.products=dense``.
"""

from ml_collections import ConfigDict

from configs import dense
from sparsejax.config import choose
from sparsejax.masked import window

STEPS = 100
# Masks change at these steps: from a quarter to three quarters of the run.
MIDDLE = {"begin": 20, "end": 80, "every": 10}
# Masks that move all the time do so for three quarters of the run.
MOVING = {"schedule": "constant", "begin": 10, "end": 70, "every": 10}
# Masks that follow the weights do so at every step.
FOLLOWING = {"begin": 0, "end": 80, "every": 1, "updater": "select"}
FFN = {"include": ("ffn",)}
# Groups lie along what a feed-forward layer sums over.
TWO_OF_FOUR = {"structure": "n_of_m", "structure_arguments": {"m": 4}, **FFN}
ONE_OF_EIGHT = {"structure": "n_of_m", "structure_arguments": {"m": 8}, **FFN}

METHODS = {
    # gradual magnitude pruning
    "gmp": {"density": 0.5, "schedule": "cubic", **MIDDLE},
    # geometric, between a quarter and three quarters of the compute
    "journey": {
        "density": 0.4,
        "schedule": "geometric",
        "allocation": "global",
        **window(STEPS, 0.4, every=5)._asdict(),
        "every": 5,
    },
    "ac_dc": {
        "density": 0.1,
        "schedule": "ac_dc",
        "updater": "select",
        "begin": 10,
        "end": 80,
        "every": 10,
    },
    # one shot, by a score over all layers
    "snip": {
        "density": 0.1,
        "schedule": "one_shot",
        "criterion": "saliency",
        "allocation": "snip",
    },
    # before the first step, by what a batch says of the drawn weights
    "grasp": {
        "density": 0.1,
        "schedule": "constant",
        "updater": "static",
        "initial_criterion": "grasp",
        "allocation": "grasp",
    },
    "fisher": {"density": 0.3, "criterion": "fisher", "allocation": "global", **MIDDLE},
    "movement": {
        "density": 0.3,
        "criterion": "movement",
        "updater": "select",
        "estimator": "straight_through",
        **MIDDLE,
        "every": 1,  # the loss pushes what is dead, and hears nothing back until then
    },
    # sparse from the start
    "static": {
        "density": 0.2,
        "schedule": "constant",
        "updater": "static",
        "allocation": "erk",
    },
    "set": {"density": 0.2, "updater": "set", "allocation": "erk", **MOVING},
    "rigl": {"density": 0.2, "updater": "rigl", "allocation": "erk", **MOVING},
    "srigl": {
        "density": 0.25,
        "structure": "constant_fan_in",
        "updater": "srigl",
        "updater_arguments": {"salient": 0.3},
        **MOVING,
        **FFN,
    },
    "sparse_momentum": {
        "density": 0.2,
        "updater": "sparse_momentum",
        "allocation": "momentum",
        "moved": 0.5,
        **MOVING,
    },
    "top_kast": {
        "density": 0.2,
        "schedule": "constant",
        "initial_criterion": "magnitude",
        "estimator": "top_kast",
        "estimator_arguments": {"backward": 0.5},
        **FOLLOWING,
        "every": 10,
    },
    # n of m
    "sr_ste": {
        "density": 0.5,
        "schedule": "constant",
        "initial_criterion": "magnitude",
        "estimator": "sr_ste",
        **TWO_OF_FOUR,
        **FOLLOWING,
    },
    "mask_decay": {
        "density": 0.125,
        "schedule": "constant",
        "initial_criterion": "magnitude",
        "estimator": "mask_decay",
        **ONE_OF_EIGHT,
        **FOLLOWING,
    },
    "structure_decay": {
        "density": 0.125,
        "initial": 0.875,
        "schedule": "halving",
        "initial_criterion": "magnitude",
        "estimator": "straight_through",
        **ONE_OF_EIGHT,
        **FOLLOWING,
    },
    # 8 of 64, 4 of 32, 2 of 16, 1 of 8
    "group_decay": {
        "density": 0.125,
        "schedule": "constant",
        "initial_criterion": "magnitude",
        "structure": "coarse_to_fine",
        "structure_arguments": {"m": 8},
        "estimator": "straight_through",
        **FFN,
        **FOLLOWING,
    },
    # two of four that is so for the transpose too; the last sixth is dense
    "two_of_four": {
        "density": 0.5,
        "schedule": "constant",
        "initial_criterion": "magnitude",
        "structure": "transposable",
        "estimator": "sr_ste",
        "estimator_arguments": {"decay": 6e-5},
        **FOLLOWING,
        "every": 40,
        "dense_from": 83,
        **FFN,
    },
    "s_ste": {
        "density": 0.5,
        "schedule": "constant",
        "initial_criterion": "magnitude",
        "estimator": "soft_threshold",
        **TWO_OF_FOUR,
        **FOLLOWING,
    },
    # masks are learned, weights are not
    "mask_llm": {
        "density": 0.5,
        "schedule": "constant",
        "initial_criterion": "magnitude",
        "estimator": "gumbel",
        **TWO_OF_FOUR,
        **FOLLOWING,
        "updater": "learned",
    },
    # a lottery ticket: four fifths stay at each of three prunings, then back to step 2
    "imp": {
        "density": 0.512,
        "schedule": "geometric",
        "allocation": "global",
        "begin": 25,
        "end": 73,
        "every": 24,
        "rewind": 2,
    },
    # blocks, in wider layers that multiply by the live ones only
    "blast": {
        "density": 0.1,
        "structure": "block",
        "structure_arguments": {"tile": (32, 32), "power": 2},
        "updater": "rigl",
        "moved": 0.1,
        "products": "blocks",
        **MIDDLE,
        **FFN,
    },
    "pixelated_butterfly": {
        "density": 0.25,
        "schedule": "constant",
        "structure": "butterfly",
        "structure_arguments": {"block": 32},
        "updater": "static",
        "products": "blocks",
        **FFN,
    },
}
# Made for weights that are trained already: docs/masked.md says how to begin with some.
TRAINED = ("mask_llm", "movement")
SIZES = {
    "blast": {"width": 128, "hidden": 1536},
    "pixelated_butterfly": {"width": 256, "hidden": 1024},
}


def get_config(method: str = "gmp") -> ConfigDict:
    """Give the dense baseline the plan of a method."""
    choose("method", method, METHODS)
    config = dense.get_config()
    config.masked = METHODS[method]
    if method in SIZES:
        config.model.width = SIZES[method]["width"]
        config.model.ffn.hidden = SIZES[method]["hidden"]
    return config
