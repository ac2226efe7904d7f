"""Routers that keep the best scores: a softmax before or after, noise, other spaces."""

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

__all__ = [
    "cosine_top_k",
    "k_means",
    "noisy_top_k",
    "softmax_top_k",
    "switch",
    "top_k_softmax",
]


def softmax_top_k(
    logits: Float[Array, "n e"],
    *,
    k: int,
    bias: Float[Array, " e"] | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    scale: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Softmax over all experts, then keep the best, inside the best groups.

    Args:
        groups: consecutive equal parts of the experts.
        kept_groups: how many of them a token may visit. A group is as good as its best
            expert; experts of other groups are never chosen.
        scale: factor on the weights (DeepSeek-V2: 16).
        renormalize: divide the kept weights by their sum, as Mixtral and Qwen3 do;
            OLMoE and DeepSeek-V2 do not.

    Raises:
        ValueError: if the groups are not equal or leave fewer than ``k`` experts.

    Source: Jiang et al. 2024, arXiv:2401.04088, Sec. 2.1; DeepSeek-AI 2024,
    arXiv:2405.04434, Sec. 2.2.2.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    choice = probs if bias is None else probs + bias[None]
    chosen = choose(keep_groups(choice, k, groups, kept_groups, judged_by=1), k)
    weights = pick(probs, chosen)
    if renormalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return Routing(chosen, weights * scale, probs, {})


def top_k_softmax(
    logits: Float[Array, "n e"], *, k: int, bias: Float[Array, " e"] | None = None
) -> Routing:
    """Keep the best logits, then take the softmax over the kept ones only.

    Source: Shazeer et al. 2017, arXiv:1701.06538, Eq. 3-5. Departure: no noise; this is
    also how gpt-oss routes.
    """
    logits = logits.astype(jnp.float32)
    chosen = choose(logits, k, bias)
    weights = jax.nn.softmax(pick(logits, chosen))
    return Routing(chosen, weights, jax.nn.softmax(logits), {})


def switch(
    logits: Float[Array, "n e"], *, k: int = 1, bias: Float[Array, " e"] | None = None
) -> Routing:
    """Visit the best expert, weighted by its probability.

    Raises:
        ValueError: if ``k`` is not 1.

    Source: Fedus et al. 2021, arXiv:2101.03961, Eq. 1-2.
    """
    if k != 1:
        raise ValueError(f"k={k}: switch visits one expert; softmax_top_k visits more")
    return softmax_top_k(logits, k=1, bias=bias, renormalize=False)


def noisy_top_k(
    logits: Float[Array, "n e"],
    *,
    k: int,
    noise: Float[Array, "n e"] | None = None,
    valid: Bool[Array, " n"] | None = None,
    key: PRNGKeyArray | None = None,
    importance_weight: float = 0.1,
    load_weight: float = 0.1,
) -> Routing:
    """Add noise of a learned scale, keep the best, softmax over the kept.

    Importance is the sum of an expert's weights; load the sum of the probabilities
    that a token would still visit it if its own noise were drawn again. Both losses
    are squared coefficients of variation over the experts.

    Args:
        noise: what the scale of the noise is the softplus of; 0 if not given.
        valid: tokens that count in the losses.
        key: None adds no noise.
        importance_weight: weight of the importance loss.
        load_weight: weight of the load loss.

    Source: Shazeer et al. 2017, arXiv:1701.06538, Eq. 3-11. Departure: 0.01 is added
    to the scale, which keeps the load smooth; router weights start small, not at 0.
    """
    logits = logits.astype(jnp.float32)
    raw = jnp.zeros_like(logits) if noise is None else noise.astype(jnp.float32)
    scale = jax.nn.softplus(raw) + 1e-2
    noisy = logits
    if key is not None:
        noisy = logits + scale * jax.random.normal(key, logits.shape)
    chosen = choose(noisy, k)
    weights = jax.nn.softmax(pick(noisy, chosen))
    one_hot = jax.nn.one_hot(chosen, logits.shape[1])
    importance = valid_mean(jnp.einsum("nk,nke->ne", weights, one_hot), valid)
    visited = jnp.ones_like(logits)  # whatever the noise, if all are
    if k < logits.shape[1]:
        visited = jax.scipy.special.ndtr((logits - _threshold(noisy, k)) / scale)
    load = valid_mean(visited, valid)
    losses = {
        "importance": importance_weight * _squared_variation(importance),
        "load": load_weight * _squared_variation(load),
    }
    return Routing(chosen, weights, jax.nn.softmax(logits), losses)


def _threshold(noisy: Float[Array, "n e"], k: int) -> Float[Array, "n e"]:
    """Give the ``k``-th best of the others: what an expert has to exceed."""
    values = pick(noisy, choose(noisy, k + 1))
    last, after = values[:, k - 1, None], values[:, k, None]
    return jnp.where(noisy >= last, after, last)


def _squared_variation(values: Float[Array, " e"]) -> Float[Array, ""]:
    return values.var() / (jnp.square(values.mean()) + 1e-10)


def cosine_top_k(
    cosines: Float[Array, "n e"], *, k: int, bias: Float[Array, " e"] | None = None
) -> Routing:
    """Softmax over scaled cosines to learned centroids, then keep the best.

    Source: Ternovtsii & Bilak 2026, arXiv:2604.14419, abstract. Departure: what the
    abstract leaves open is ours: one learned temperature, from 0.1; weights sum to 1.
    """
    return softmax_top_k(cosines, k=k, bias=bias)


def k_means(
    similarities: Float[Array, "n e"], *, k: int, bias: Float[Array, " e"] | None = None
) -> Routing:
    """Visit the experts whose running means look most like the token.

    No router is learned: the scores are cosines to means that follow, outside the
    gradient, the tokens routed to each expert.

    Source: Ahrac et al. 2026, arXiv:2605.12476, abstract. Departure: weights are a
    softmax of the kept cosines.
    """
    return top_k_softmax(similarities, k=k, bias=bias)
