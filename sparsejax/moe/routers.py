"""Routers: token-by-expert logits in, an assignment out.

Every router is a pure function ``(logits, *, k, bias, ...) -> Routing``. It owns no
parameters, adds no noise of its own and computes in float32. ``bias`` moves the choice
of experts and never their weights. Beyond ``k``, a router may name further keywords:
those in ``CONTEXT`` are arrays, which the layer supplies to whoever names them; the
others are settings, with defaults, that a config may set. Experts are distinct per
token; ties go to the lower index.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "CONTEXT",
    "ROUTERS",
    "Router",
    "Routing",
    "accepts",
    "settings",
    "sigma_moe",
    "sigmoid_top_k",
    "softmax_top_k",
    "switch",
    "top_k_softmax",
]

# bias " e", tokens " n" (ids of the input), valid " n" (not padding), and a random key.
CONTEXT = ("bias", "tokens", "valid", "key")


class Routing(NamedTuple):
    """Which experts each token visits, and with what weight."""

    experts: Int[Array, "n k"]
    weights: Float[Array, "n k"]  # float32; 0 marks an unused slot
    probs: Float[Array, "n e"]  # float32 rows that sum to one: what balancing sees
    losses: dict[str, Float[Array, ""]]  # a router's own, already weighted


Router = Callable[..., Routing]


def accepts(router: Router) -> set[str]:
    """Say which of ``CONTEXT`` a router names."""
    return {p for p in inspect.signature(router).parameters if p in CONTEXT}


def settings(router: Router) -> dict[str, Any]:
    """Give a router's own settings, with their defaults."""
    parameters = inspect.signature(router).parameters.values()
    known = ("logits", "k", *CONTEXT)
    return {p.name: p.default for p in parameters if p.name not in known}


def _check(k: int, experts: int) -> None:
    if not 1 <= k <= experts:
        raise ValueError(
            f"k={k}: a token visits at least one and at most all of the {experts}"
            " experts"
        )


def _choose(
    scores: Float[Array, "n e"], k: int, bias: Float[Array, " e"] | None
) -> Int[Array, "n k"]:
    """Pick the ``k`` best experts of each token."""
    _check(k, scores.shape[1])
    if bias is not None:
        scores = scores + bias[None]
    return _best(jax.lax.stop_gradient(scores), k)


def _best(scores: Float[Array, "n e"], k: int) -> Int[Array, "n k"]:
    """Give the places of the ``k`` largest of each row, as ``lax.top_k`` does.

    It is as fast for a few choices, and stays on a row's own device: XLA gathers all
    rows on every device to run its top-k, but not to run reductions.
    """
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)

    def choose(taken: Array, _: None) -> tuple[Array, Array]:
        largest = jnp.where(taken, -jnp.inf, scores).max(axis=1, keepdims=True)
        tied = ~taken & (scores == largest)
        best = jnp.where(tied, place, scores.shape[1] - 1).min(axis=1, keepdims=True)
        return taken | (place == best), best[:, 0]

    return jax.lax.scan(choose, jnp.zeros_like(scores, dtype=bool), length=k)[1].T


def _pick(
    scores: Float[Array, "n e"], chosen: Int[Array, "n k"]
) -> Float[Array, "n k"]:
    return jnp.take_along_axis(scores, chosen, axis=1)


def softmax_top_k(
    logits: Float[Array, "n e"],
    *,
    k: int,
    bias: Float[Array, " e"] | None = None,
    renormalize: bool = True,
) -> Routing:
    """Softmax over all experts, then keep the best.

    Args:
        renormalize: divide the kept weights by their sum, as Mixtral and Qwen3 do;
            OLMoE does not.

    Source: Jiang et al. 2024, arXiv:2401.04088, Sec. 2.1.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    chosen = _choose(probs, k, bias)
    weights = _pick(probs, chosen)
    if renormalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return Routing(chosen, weights, probs, {})


def top_k_softmax(
    logits: Float[Array, "n e"], *, k: int, bias: Float[Array, " e"] | None = None
) -> Routing:
    """Keep the best logits, then take the softmax over the kept ones only.

    Source: Shazeer et al. 2017, arXiv:1701.06538, Eq. 3-5. Departure: no noise; this is
    also how gpt-oss routes.
    """
    logits = logits.astype(jnp.float32)
    chosen = _choose(logits, k, bias)
    weights = jax.nn.softmax(_pick(logits, chosen))
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
    choice = _keep_groups(choice, k, groups, kept_groups)
    chosen = _choose(choice, k, None)
    weights = _pick(scores, chosen)
    if renormalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    probs = scores / (scores.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(chosen, weights * scale, probs, {})


def _keep_groups(
    scores: Float[Array, "n e"], k: int, groups: int, kept: int
) -> Float[Array, "n e"]:
    """Set the scores outside the ``kept`` best groups to minus infinity."""
    tokens, experts = scores.shape
    _check(k, experts)
    if groups < 1 or experts % groups:
        raise ValueError(f"groups={groups}: must divide the {experts} experts")
    size = experts // groups
    if not 1 <= kept <= groups or kept * size < k:
        raise ValueError(
            f"kept_groups={kept}: must be 1 to {groups} (groups) and leave k={k}"
            f" experts; a group has {size}"
        )
    if kept == groups:
        return scores
    parts = jax.lax.stop_gradient(scores).reshape(tokens * groups, size)
    two = _pick(parts, _best(parts, min(2, size)))
    best = _best(two.sum(axis=1).reshape(tokens, groups), kept)
    parts = parts.reshape(tokens, groups, size)
    live = (best[:, :, None] == jnp.arange(groups)[None, None]).any(axis=1)
    # Not zero: a biased score below zero would lose to an expert outside its groups.
    return jnp.where(live[:, :, None], parts, -jnp.inf).reshape(tokens, experts)


def sigma_moe(
    logits: Float[Array, "n e"],
    *,
    k: int,
    bias: Float[Array, " e"] | None = None,
    valid: Bool[Array, " n"] | None = None,
    entropy_weight: float = 1e-3,
) -> Routing:
    """Weigh the best experts by their sigmoids; keep the mean choice spread out.

    Args:
        valid: tokens that count in the loss.
        entropy_weight: weight of minus the entropy of the mean softmax.

    Source: Csordás et al. 2023, arXiv:2310.10837, Sec. 4. Departure: expert dropout is
    left to the caller, who may set logits to minus infinity.
    """
    logits = logits.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits)
    chosen = _choose(scores, k, bias)
    live = jnp.ones(logits.shape[0], bool) if valid is None else valid
    count = jnp.maximum(live.sum(), 1).astype(jnp.float32)
    mean = jnp.where(live[:, None], jax.nn.softmax(logits), 0).sum(axis=0) / count
    negative_entropy = (mean * jnp.log(jnp.maximum(mean, 1e-30))).sum()
    losses = {"router_entropy": entropy_weight * negative_entropy}
    probs = scores / (scores.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(chosen, _pick(scores, chosen), probs, losses)


ROUTERS: dict[str, Router] = {
    "softmax_top_k": softmax_top_k,
    "top_k_softmax": top_k_softmax,
    "switch": switch,
    "sigmoid_top_k": sigmoid_top_k,
    "sigma_moe": sigma_moe,
}
