"""Routers that keep whatever is positive: how many experts a token visits is learned.

Nothing is cut off, so the output is continuous in the scores. ``k`` is what is hoped
for, where a router has a way of steering towards it.
"""

import math

import jax
import jax.numpy as jnp

from sparsejax.moe.routers.routing import (
    Routing,
    check_count,
    everywhere,
    shares,
    valid_mean,
)
from sparsejax.typing import Array, Bool, Float

__all__ = ["block_ffn", "remoe"]

SHARPNESS = 100.0  # how steep the soft indicator of a visit is


def remoe(
    logits: Float[Array, "n e"],
    *,
    k: int,
    penalty: Float[Array, ""] | None = None,
    valid: Bool[Array, " n"] | None = None,
) -> Routing:
    """Weigh every expert by the positive part of its logit; tax what is crowded.

    Args:
        k: experts of a mean token, which the state ``penalty`` steers towards.
        penalty: weight of the mean weight of the experts, each multiplied by its load
            over the load asked for; 0 if not given.
        valid: tokens that count in the loss.

    Source: Wang et al. 2024, arXiv:2412.14711, Eq. 5-11.
    """
    check_count(k, logits.shape[1])
    weights = jax.nn.relu(logits.astype(jnp.float32))
    visits = valid_mean((weights > 0).astype(jnp.float32), valid)
    crowd = visits * (logits.shape[1] / k)
    tax = (crowd * valid_mean(weights, valid)).sum()
    losses = {"sparsity": (0.0 if penalty is None else penalty) * tax}
    return Routing(everywhere(weights), weights, shares(weights), losses)


def block_ffn(
    logits: Float[Array, "n e"],
    *,
    k: int,
    gain: Float[Array, " e"] | None = None,
    batch: int | None = None,
    valid: Bool[Array, " n"] | None = None,
    chunk: int = 64,
    locality_weight: float = 2e-3,
    chunk_weight: float = 5e-2,
) -> Routing:
    """Weigh the positive logits by their root-mean-square norm over the experts.

    One loss asks for neighbours to visit the same experts, the other for few experts
    to be visited by any of ``chunk`` consecutive tokens, so that a few can be computed
    together.

    Args:
        k: not used: nothing is cut off and nothing steers.
        gain: learned factor on each expert's weight; 1 if not given.
        batch: sequences that the tokens are of; one if not given.
        valid: tokens that count in the losses.
        chunk: tokens that are looked at together.
        locality_weight: weight of the loss between neighbours.
        chunk_weight: weight of the loss over chunks.

    Source: Song et al. 2025, arXiv:2507.08771, Eq. 2-8. Departure: the weight of the
    loss over chunks is fixed, not scheduled.
    """
    check_count(k, logits.shape[1])
    logits = logits.astype(jnp.float32)
    scores = jax.nn.relu(logits)
    size = jnp.mean(scores * scores, axis=1, keepdims=True)
    weights = scores * jax.lax.rsqrt(size + 1e-6)
    if gain is not None:
        weights = weights * gain[None]
    live = jnp.ones(logits.shape[0], bool) if valid is None else valid
    sequences = (batch or 1, -1)
    rows = logits.reshape(*sequences, logits.shape[1])
    probs = shares(scores)
    # A token without any visit takes part in no chunk.
    mass = jnp.where((scores > 0).any(axis=1, keepdims=True), probs, 0)
    mass = jnp.where(live[:, None], mass, 0).reshape(rows.shape)
    live = live.reshape(sequences)
    losses = {
        "locality": locality_weight * _locality(rows, live),
        "chunk": chunk_weight * chunk_sparsity(mass, live, chunk),
    }
    return Routing(everywhere(weights), weights, probs, losses)


def _locality(rows: Float[Array, "b t e"], live: Bool[Array, "b t"]) -> Array:
    """Cross-entropy between the soft visits of each token and of the one after it."""
    soft = SHARPNESS * jax.nn.relu(rows)
    before, after = soft[:, :-1], jax.nn.sigmoid(soft[:, 1:])
    entropy = jax.nn.softplus(before) - before * after
    both = live[:, 1:] & live[:, :-1]
    count = jnp.maximum(both.sum() * rows.shape[2], 1).astype(jnp.float32)
    return jnp.where(both[..., None], entropy, 0).sum() / count


def chunk_sparsity(
    mass: Float[Array, "b t e"], live: Bool[Array, "b t"], chunk: int
) -> Float[Array, ""]:
    """Give the mean probability that a chunk visits an expert.

    Args:
        mass: shares of each token; rows of zeros visit nothing.
        live: tokens that count; a chunk without any counts for nothing.
        chunk: tokens in a chunk; the last of a sequence may be shorter.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least one token")
    b, t, e = mass.shape
    chunk = min(chunk, t)
    count = math.ceil(t / chunk)
    pad = ((0, 0), (0, count * chunk - t))
    mass = jnp.pad(mass, (*pad, (0, 0))).reshape(b * count, chunk, e)
    there = jnp.pad(live, pad).reshape(b * count, chunk).any(axis=1)
    visited = 1 - jnp.prod(1 - mass, axis=1)
    return valid_mean(visited, there).mean()
