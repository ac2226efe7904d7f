"""Usage: how evenly a memory is read. Ids and weights in, float32 scalars out.

Statistics are over all tokens of the batch and have no gradient.
"""

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["counts_of", "entropy", "mean_of_valid", "slot_counts", "usage"]


def usage(
    ids: Int[Array, "n h k"],
    weights: Float[Array, "n h k"],
    *,
    slots: int,
    valid: Bool[Array, "b t"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Measure usage of the slots in one batch.

    ``usage`` is the share of slots read with a weight above zero, ``dead`` that of the
    others (over several batches, of the sum of ``slot_counts``), ``usage_kl`` the
    divergence of the summed weights from uniform (nats; 0 is even, ``log(slots)`` is a
    single slot), ``entropy`` the mean entropy of the weights of one head (nats; 0 is
    one slot, ``log(k)`` is all alike).

    Args:
        valid: tokens that count; the others may be padding.

    Source: Lample et al. 2019, arXiv:1907.05242, Sec. 4.
    """
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    counted = counts_of(valid, ids.shape[0])
    total = jnp.zeros(slots, jnp.float32).at[ids].add(weights * counted[:, None, None])
    used = jnp.mean(total > 0, dtype=jnp.float32)
    return {
        "usage": used,
        "dead": 1 - used,
        "usage_kl": jnp.log(float(slots)) - entropy(total),
        "entropy": mean_of_valid(entropy(weights).mean(-1), valid),
    }


def slot_counts(
    ids: Int[Array, "n h k"],
    weights: Float[Array, "n h k"],
    *,
    slots: int,
    valid: Bool[Array, "b t"] | None = None,
) -> Int[Array, " m"]:
    """Count how often each slot is read with a weight above zero.

    Args:
        valid: tokens that count; the others may be padding.
    """
    read = weights > 0
    if valid is not None:
        read &= valid.reshape(-1)[:, None, None]
    return jnp.zeros(slots, jnp.int32).at[ids].add(read.astype(jnp.int32))


def entropy(mass: Float[Array, "*rows k"]) -> Float[Array, "*rows"]:
    """Entropy in nats of the last axis, made to sum to one; 0 where there is none."""
    total = mass.sum(-1, keepdims=True)
    share = mass / jnp.where(total > 0, total, 1)
    return jax.scipy.special.entr(share).sum(-1)


def mean_of_valid(
    x: Float[Array, "n *shape"], valid: Bool[Array, "b t"] | None
) -> Float[Array, "*shape"]:
    """Mean over the tokens that count; 0 if there are none."""
    counted = counts_of(valid, x.shape[0])
    each = counted.reshape(-1, *[1] * (x.ndim - 1))
    return (x * each).sum(axis=0) / jnp.maximum(counted.sum(), 1)


def counts_of(valid: Bool[Array, "b t"] | None, tokens: int) -> Float[Array, " n"]:
    """Give 1 for each token that counts, 0 for the others."""
    if valid is None:
        return jnp.ones(tokens, jnp.float32)
    return valid.reshape(-1).astype(jnp.float32)
