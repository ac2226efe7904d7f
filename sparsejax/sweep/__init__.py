"""Sweeps: many runs from one file, each once, and a table of what they gave.

``get_sweep()`` of a file in ``configs/sweeps/`` returns a ``Sweep``; ``sweep.py`` runs
it; ``read_table`` gives ``results/NAME.csv`` as columns for ``sparsejax.scaling``.
"""

from sparsejax.sweep.grid import (
    Choice,
    Point,
    Sweep,
    axis,
    iso_flops,
    iso_parameters,
    planned_cost,
    points,
    product,
    token_budgets,
    variants,
    zipped,
)
from sparsejax.sweep.record import read_table

__all__ = [
    "Choice",
    "Point",
    "Sweep",
    "axis",
    "iso_flops",
    "iso_parameters",
    "planned_cost",
    "points",
    "product",
    "read_table",
    "token_budgets",
    "variants",
    "zipped",
]
