"""Routers by name: each is its equation, all have the signature of ``routing``."""

from collections.abc import Callable

from sparsejax.moe.routers.assignment import (
    base,
    expert_choice,
    expert_choice_by_position,
    s_base,
    selective_sinkhorn,
)
from sparsejax.moe.routers.hashed import (
    hash_bigram,
    hash_position,
    hash_previous,
    hash_random,
    hash_table,
    multi_hash,
)
from sparsejax.moe.routers.relu import block_ffn, remoe
from sparsejax.moe.routers.routing import (
    CONTEXT,
    Router,
    Routing,
    accepts,
    settings,
)
from sparsejax.moe.routers.sigmoid import sigma_moe, sigmoid_top_k
from sparsejax.moe.routers.top_k import (
    cosine_top_k,
    k_means,
    noisy_top_k,
    softmax_top_k,
    switch,
    top_k_softmax,
)

__all__ = [
    "CONTEXT",
    "LEAKS",
    "MOST",
    "ROUTERS",
    "Router",
    "Routing",
    "accepts",
    "settings",
]

ROUTERS: dict[str, Router] = {
    "base": base,
    "block_ffn": block_ffn,
    "cosine_top_k": cosine_top_k,
    "expert_choice": expert_choice,
    "expert_choice_by_position": expert_choice_by_position,
    "hash_bigram": hash_bigram,
    "hash_position": hash_position,
    "hash_previous": hash_previous,
    "hash_random": hash_random,
    "hash_table": hash_table,
    "k_means": k_means,
    "multi_hash": multi_hash,
    "noisy_top_k": noisy_top_k,
    "remoe": remoe,
    "s_base": s_base,
    "selective_sinkhorn": selective_sinkhorn,
    "sigma_moe": sigma_moe,
    "sigmoid_top_k": sigmoid_top_k,
    "softmax_top_k": softmax_top_k,
    "switch": switch,
    "top_k_softmax": top_k_softmax,
}

# Routers whose choice depends on later tokens even when nothing is trained, and what a
# causal model may use instead.
LEAKS = {"expert_choice": "expert_choice_by_position"}

# The most visits an expert gets of tokens in sequences, where a router sees to that:
# many slots are then moved as few rows.
MOST: dict[str, Callable[[int, int, int, int], int]] = {
    "expert_choice": lambda tokens, _, experts, k: -(-tokens * k // experts),
    "expert_choice_by_position": (
        lambda tokens, batch, experts, k: tokens // batch * -(-batch * k // experts)
    ),
}
