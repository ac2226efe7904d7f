"""Balance: losses and state that keep experts busy, and numbers that say if they are.

Losses are unweighted scalars of a ``Routing``; ``load`` counts visits and the rest
derives from it. ``valid`` marks the tokens that count: padding enters neither visits
nor mean probabilities. Statistics are over the arrays given, so give them whole.
"""

import math

import jax
import jax.numpy as jnp

from sparsejax.moe.routers.routing import Routing, valid_mean
from sparsejax.typing import Array, Bool, Float

__all__ = [
    "balance_loss",
    "expert_load",
    "metrics",
    "updated_bias",
    "z_loss",
]

Valid = Bool[Array, " n"] | None


def expert_load(routing: Routing, *, valid: Valid = None) -> Float[Array, " e"]:
    """Count the visits of each expert; slots of weight 0 are no visits."""
    used = routing.weights != 0
    if valid is not None:
        used &= valid[:, None]
    experts = jnp.arange(routing.probs.shape[1], dtype=routing.experts.dtype)
    visits = (routing.experts[..., None] == experts[None, None]) & used[..., None]
    return visits.sum(axis=(0, 1)).astype(jnp.float32)


def _share(load: Float[Array, " e"]) -> Float[Array, " e"]:
    return load / jnp.maximum(load.sum(), 1)


def balance_loss(routing: Routing, *, valid: Valid = None) -> Float[Array, ""]:
    """Give ``experts * sum(share of visits * mean probability)``: 1 when balanced.

    Source: Fedus et al. 2021, arXiv:2101.03961, Eq. 4-6. Departure: visits are divided
    by their number, so that the balanced value is 1 for any ``k``; unweighted.
    """
    share = jax.lax.stop_gradient(_share(expert_load(routing, valid=valid)))
    return routing.probs.shape[1] * (share * valid_mean(routing.probs, valid)).sum()


def z_loss(logits: Float[Array, "n e"], *, valid: Valid = None) -> Float[Array, ""]:
    """Give the mean squared log-sum-exp of the logits.

    Source: Zoph et al. 2022, arXiv:2202.08906, Eq. 5.
    """
    z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=1)
    return valid_mean(jnp.square(z), valid)


def updated_bias(
    bias: Float[Array, "*l e"], load: Float[Array, "*l e"], rate: float
) -> Float[Array, "*l e"]:
    """Raise the bias of the experts below the mean load by ``rate``, lower the others'.

    To be applied outside the gradient, with the load of the whole batch.

    Source: Wang et al. 2024, arXiv:2408.15664, Alg. 1.
    """
    gap = load.mean(axis=-1, keepdims=True) - load
    return bias + rate * jnp.sign(gap).astype(bias.dtype)


def _entropy(p: Float[Array, " e"]) -> Float[Array, ""]:
    """Entropy as a share of its maximum; 1 for a single expert."""
    if p.shape[0] == 1:
        return jnp.ones((), p.dtype)
    return -(p * jnp.log(jnp.maximum(p, 1e-30))).sum() / math.log(p.shape[0])


def metrics(
    routing: Routing, kept: Routing | None = None, *, valid: Valid = None
) -> dict[str, Array]:
    """Measure how evenly and how surely tokens are routed.

    ``load`` counts visits, for ``updated_bias`` and for sums over batches; ``visits``
    are those of a mean token, which some routers leave open. The others are ratios:
    standard deviation, maximal excess and minimum over the mean load, the two entropies
    over their maximum, the share of experts without a visit, the mean probability of
    the likeliest expert, the shares of visits and of tokens dropped.

    Args:
        routing: what the router chose.
        kept: what is left of it after a capacity limit, if there is one.
        valid: tokens that count.
    """
    used = routing.weights != 0
    load = expert_load(routing, valid=valid)
    mean = jnp.maximum(load.mean(), 1e-9)
    values = {
        "load": load,
        "visits": valid_mean(used.sum(axis=1, dtype=jnp.float32), valid),
        "load_deviation": load.std() / mean,
        "load_violation": load.max() / mean - 1,
        "load_minimum": load.min() / mean,
        "load_entropy": _entropy(_share(load)),
        "router_entropy": _entropy(valid_mean(routing.probs, valid)),
        "router_confidence": valid_mean(routing.probs.max(axis=1), valid),
        "dead_experts": (load == 0).mean(dtype=jnp.float32),
    }
    if kept is not None:
        arrived = expert_load(kept, valid=valid).sum()
        values["dropped"] = 1 - arrived / jnp.maximum(load.sum(), 1)
        lost = (routing.weights != 0).any(axis=1) & ~(kept.weights != 0).any(axis=1)
        values["left_behind"] = valid_mean(lost.astype(jnp.float32), valid)
    return jax.tree.map(jax.lax.stop_gradient, values)
