"""Usage: how evenly a memory is read. Ids and weights in, float32 scalars out.

Statistics are over all tokens of the batch and have no gradient.
"""

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["usage"]


def usage(
    ids: Int[Array, "n h k"],
    weights: Float[Array, "n h k"],
    *,
    slots: int,
    valid: Bool[Array, "b t"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Measure usage of the slots in one batch.

    ``usage`` is the share of slots read with a weight above zero, ``usage_kl`` the
    divergence of the summed weights from uniform (nats; 0 is even, ``log(slots)`` is a
    single slot), ``entropy`` the mean entropy of the weights of one head (nats; 0 is
    one slot, ``log(k)`` is all alike).

    Args:
        valid: tokens that count; the others may be padding.

    Source: Lample et al. 2019, arXiv:1907.05242, Sec. 4.
    """
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    counted = jnp.ones(ids.shape[0]) if valid is None else valid.reshape(-1)
    counted = counted.astype(jnp.float32)[:, None, None]
    total = jnp.zeros(slots, jnp.float32).at[ids].add(weights * counted)
    heads = jnp.maximum(1, counted.sum() * ids.shape[1])
    return {
        "usage": jnp.mean(total > 0, dtype=jnp.float32),
        "usage_kl": jnp.log(float(slots)) - _entropy(total),
        "entropy": jnp.sum(_entropy(weights) * counted[..., 0]) / heads,
    }


def _entropy(mass: Float[Array, "*rows k"]) -> Float[Array, "*rows"]:
    total = mass.sum(-1, keepdims=True)
    share = mass / jnp.where(total > 0, total, 1)
    return jax.scipy.special.entr(share).sum(-1)
