"""Routers that score each expert by itself, through a sigmoid."""

import jax
import jax.numpy as jnp

from sparsejax.moe.routers.routing import (
    Routing,
    choose,
    keep_groups,
    pick,
    valid_mean,
)
from sparsejax.typing import Array, Bool, Float, PRNGKeyArray

__all__ = ["sigma_moe", "sigmoid_top_k"]


def sigmoid_top_k(
    logits: Float[Array, "n e"],
    *,
    k: int,
    bias: Float[Array, " e"] | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    scale: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Choose by sigmoid plus bias, inside the best groups; weigh by the sigmoid alone.

    Args:
        groups: consecutive equal parts of the experts.
        kept_groups: how many of them a token may visit. A group is as good as its two
            best experts together; experts of other groups are never chosen.
        scale: factor on the weights (DeepSeek-V3: 2.5).
        renormalize: divide the kept weights by their sum.

    Raises:
        ValueError: if the groups are not equal or leave fewer than ``k`` experts.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, Eq. 12-16.
    """
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    choice = scores if bias is None else scores + bias[None]
    choice = keep_groups(choice, k, groups, kept_groups, judged_by=2)
    chosen = choose(choice, k, None)
    weights = pick(scores, chosen)
    if renormalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    probs = scores / (scores.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(chosen, weights * scale, probs, {})


def sigma_moe(
    logits: Float[Array, "n e"],
    *,
    k: int,
    bias: Float[Array, " e"] | None = None,
    valid: Bool[Array, " n"] | None = None,
    key: PRNGKeyArray | None = None,
    entropy_weight: float = 1e-3,
    expert_dropout: float = 0.0,
) -> Routing:
    """Weigh the best experts by their sigmoids; keep the mean choice spread out.

    Args:
        valid: tokens that count in the loss.
        key: random key in training, None otherwise.
        entropy_weight: weight of minus the entropy of the mean softmax.
        expert_dropout: probability that a token may not visit an expert, in training.

    Raises:
        ValueError: unless the probability is in [0, 1).

    Source: Csordás et al. 2023, arXiv:2310.10837, Sec. 4.
    """
    if not 0 <= expert_dropout < 1:
        raise ValueError(f"expert_dropout={expert_dropout}: must be in [0, 1)")
    logits = logits.astype(jnp.float32)
    scores = eligible = jax.nn.sigmoid(logits)
    if key is not None and expert_dropout:
        kept = jax.random.bernoulli(key, 1 - expert_dropout, scores.shape)
        scores = jnp.where(kept, scores, 0)
        eligible = jnp.where(kept, scores, -jnp.inf)
    chosen = choose(eligible, k, bias)
    mean = valid_mean(jax.nn.softmax(logits), valid)
    negative_entropy = (mean * jnp.log(jnp.maximum(mean, 1e-30))).sum()
    losses = {"router_entropy": entropy_weight * negative_entropy}
    probs = scores / (scores.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(chosen, pick(scores, chosen), probs, losses)
