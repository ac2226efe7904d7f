"""Scaling laws: what single runs say about the runs that were not made.

``LAWS`` holds them by name; ``fit`` finds coefficients, with intervals and an error on
rows that it has not seen; ``allocate`` spends a budget. Tables are mappings from the
names of columns to equally long arrays.
"""

from sparsejax.scaling.fit import Fit, fit
from sparsejax.scaling.frontier import (
    Allocation,
    Valley,
    allocate,
    chinchilla_optimum,
    frontier,
    power_law,
    valleys,
)
from sparsejax.scaling.laws import (
    Law,
    Start,
    average_parameters,
    chinchilla,
    fine_grained,
    joint,
    kaplan,
    routed,
    sparse_attention,
    sparsely_connected,
)

_ADDITIVE = {
    "E": Start(0.3, 2.5),
    "A": Start(1, 1e4),
    "alpha": Start(0.1, 1),
    "B": Start(1, 1e5),
    "beta": Start(0.1, 1),
}

LAWS: dict[str, Law] = {
    "chinchilla": Law(chinchilla, ("parameters", "tokens"), _ADDITIVE),
    "kaplan": Law(
        kaplan,
        ("parameters", "tokens"),
        {
            "N_c": Start(1e9, 1e15),
            "alpha_N": Start(0.03, 0.5),
            "D_c": Start(1e9, 1e15),
            "alpha_D": Start(0.03, 0.5),
        },
    ),
    "routed": Law(
        routed,
        ("parameters", "experts"),
        {
            "a": Start(-0.3, 0, positive=False),
            "b": Start(-0.3, 0, positive=False),
            "c": Start(0, 0.03, positive=False),
            "d": Start(0.3, 2, positive=False),
            "E_start": Start(1, 5),
            "E_max": Start(50, 1000),
        },
    ),
    "fine_grained": Law(
        fine_grained,
        ("parameters", "tokens", "granularity"),
        {
            "c": Start(0.3, 1.5),
            "g": Start(0.5, 5),
            "gamma": Start(0.2, 1.5),
            "a": Start(1, 100),
            "alpha": Start(0.05, 0.5),
            "b": Start(1, 100),
            "beta": Start(0.05, 0.5),
        },
    ),
    "sparsely_connected": Law(
        sparsely_connected,
        ("parameters", "density", "tokens"),
        {
            "a_S": Start(1, 100),
            "b_S": Start(0.2, 2),
            "c_S": Start(1, 200),
            "b_N": Start(0.1, 0.6),
            "a_D": Start(1e6, 1e10),
            "b_D": Start(0.1, 1),
            "c": Start(0.2, 2),
        },
    ),
    "average_parameters": Law(average_parameters, ("average", "tokens"), _ADDITIVE),
    "sparse_attention": Law(
        sparse_attention,
        ("parameters", "length", "density"),
        {
            "a": Start(-0.5, 0.5, positive=False),
            "b": Start(-0.5, 0.5, positive=False),
            "c": Start(-0.5, 0.5, positive=False),
            "d": Start(0.1, 10),
        },
    ),
    "joint": Law(
        joint,
        (
            "active",
            "total",
            "tokens",
            "granularity",
            "density",
            "length",
            "attention",
        ),
        {
            **_ADDITIVE,
            "shape": Start(0.5, 2),
            "routing": Start(0, 0.3, positive=False),
            "mixed": Start(0, 0.02, positive=False),
            "first": Start(0.5, 2),
            "last_inverse": Start(1e-4, 1e-2),
            "fine": Start(0.01, 1),
            "gamma": Start(0.2, 1.5),
            "masked": Start(0.01, 1),
            "mu": Start(0.2, 2),
            "context": Start(-0.2, 0.2, positive=False),
            "reading": Start(-0.2, 0.2, positive=False),
        },
    ),
}

__all__ = [
    "LAWS",
    "Allocation",
    "Fit",
    "Law",
    "Start",
    "Valley",
    "allocate",
    "chinchilla_optimum",
    "fit",
    "frontier",
    "power_law",
    "valleys",
]
