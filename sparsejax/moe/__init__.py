"""Mixture of experts: routers choose, dispatchers carry, experts answer.

``ROUTERS`` maps logits to assignments, ``DISPATCHERS`` applies experts to them; every
pair agrees with the dense oracle.
"""

from sparsejax.moe.balance import (
    balance_loss,
    expert_load,
    metrics,
    updated_bias,
    z_loss,
)
from sparsejax.moe.capacity import (
    PRIORITIES,
    ROUNDINGS,
    capacity_of,
    drop_shares,
    limited,
)
from sparsejax.moe.config import MoEConfig
from sparsejax.moe.dispatch import DISPATCHERS
from sparsejax.moe.exchange import EXCHANGES, Exchange, apply_experts
from sparsejax.moe.experts import ACTIVATIONS, HIDDEN, GatedExperts
from sparsejax.moe.grouped import grouped_matmul
from sparsejax.moe.layer import MoE
from sparsejax.moe.routers import ROUTERS, Routing
from sparsejax.moe.sources import SOURCES, STATES, RouterBias, RouterState
from sparsejax.moe.tables import TABLES

__all__ = [
    "ACTIVATIONS",
    "DISPATCHERS",
    "EXCHANGES",
    "HIDDEN",
    "PRIORITIES",
    "ROUNDINGS",
    "ROUTERS",
    "SOURCES",
    "STATES",
    "TABLES",
    "Exchange",
    "GatedExperts",
    "MoE",
    "MoEConfig",
    "RouterBias",
    "RouterState",
    "Routing",
    "apply_experts",
    "balance_loss",
    "capacity_of",
    "drop_shares",
    "expert_load",
    "grouped_matmul",
    "limited",
    "metrics",
    "updated_bias",
    "z_loss",
]
