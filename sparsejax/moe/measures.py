"""Measures of who goes where, over the tokens of a batch, of two, or of many steps.

They take what a layer reports as ``metrics["evidence/experts"]`` and
``metrics["evidence/weights"]``: the experts of each token and their weights, 0 where a
slot is unused or the token is padding. The model's ``metrics`` have them for each layer
along a first axis; ``jax.vmap`` takes all layers at once. Beside them stand the scores
that the router chose by, ``metrics["evidence/scores"]``, a row for each token, and for
each round where tokens ask again.
"""

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "churn",
    "co_activation",
    "dead_experts",
    "information",
    "joint_counts",
    "position_bucket",
    "saturation",
    "specialisation",
]

Experts = Int[Array, "n k"]
Weights = Float[Array, "n k"]


def _visits(experts: Experts, weights: Weights, count: int) -> Bool[Array, "n e"]:
    ids = jnp.arange(count, dtype=experts.dtype)
    same = experts[..., None] == ids[None, None]
    return (same & (weights != 0)[..., None]).any(axis=1)


def _ratio(part: Int[Array, ""], whole: Int[Array, ""]) -> Float[Array, ""]:
    return part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)


def saturation(
    early: tuple[Experts, Weights], late: tuple[Experts, Weights], *, experts: int
) -> Float[Array, ""]:
    """Give the share of a token's late visits that it paid early already.

    Both are of the same tokens, by two states of one layer. 1: nothing has changed.

    Source: Muennighoff et al. 2024, arXiv:2409.02060, Sec. 5.1.
    """
    a, b = (_visits(*visits, experts) for visits in (early, late))
    return _ratio((a & b).sum(), b.sum())


def churn(
    before: tuple[Experts, Weights], after: tuple[Experts, Weights], *, experts: int
) -> Float[Array, ""]:
    """Give the share of the tokens that do not visit the same experts as before.

    Source: Nguyen et al. 2025, arXiv:2505.00792, abstract.
    """
    a, b = (_visits(*visits, experts) for visits in (before, after))
    there = (a | b).any(axis=1)
    changed = (a != b).any(axis=1) & there
    return _ratio(changed.sum(), there.sum())


def co_activation(
    experts: Experts, weights: Weights, *, count: int
) -> Float[Array, "e e"]:
    """Give, for each expert, the share of its tokens that visit each other one too.

    Source: Muennighoff et al. 2024, arXiv:2409.02060, Sec. 5.2.
    """
    visits = _visits(experts, weights, count).astype(jnp.float32)
    together = visits.T @ visits
    own = jnp.maximum(jnp.diagonal(together), 1)
    return together / own[:, None]


def joint_counts(
    experts: Experts,
    weights: Weights,
    labels: Int[Array, " n"],
    *,
    count: int,
    groups: int,
) -> Float[Array, "v e"]:
    """Count the visits of each expert by tokens of each label: an id, a place.

    Args:
        labels: from 0 to ``groups - 1``.
    """
    visits = _visits(experts, weights, count).astype(jnp.float32)
    return jax.ops.segment_sum(visits, labels, groups)


def specialisation(counts: Float[Array, "v e"]) -> Float[Array, "v e"]:
    """Give the share of each label's visits that go to each expert.

    Source: Muennighoff et al. 2024, arXiv:2409.02060, Sec. 5.4.
    """
    return counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)


def information(counts: Float[Array, "v e"]) -> Float[Array, ""]:
    """Give what the label tells about the expert, over all there is to tell.

    Mutual information over the entropy of the load: 1 if the label decides, 0 if it
    plays no part.
    """
    joint = counts / jnp.maximum(counts.sum(), 1)

    def entropy(p: Array) -> Array:
        return -(p * jnp.log(jnp.maximum(p, 1e-30))).sum()

    load = entropy(joint.sum(axis=0))
    shared = entropy(joint.sum(axis=1)) + load - entropy(joint)
    return jnp.where(load > 1e-6, shared / jnp.maximum(load, 1e-6), 0)


def position_bucket(positions: Int[Array, " n"], *, groups: int) -> Int[Array, " n"]:
    """Give the number of binary digits of a position, for a label; at most the last."""
    digits = 32 - jax.lax.clz(positions.astype(jnp.int32))
    return jnp.minimum(digits, groups - 1)


def dead_experts(loads: Float[Array, "*l s e"], *, window: int) -> Float[Array, "*l"]:
    """Give the share of experts that nothing visited in the last ``window`` loads.

    Args:
        loads: visits of each expert, step after step, as the metrics log has them.
    """
    if not 1 <= window <= loads.shape[-2]:
        raise ValueError(
            f"window={window}: must be 1 to {loads.shape[-2]}, the loads there are"
        )
    recent = loads[..., -window:, :].sum(axis=-2)
    return (recent == 0).mean(axis=-1, dtype=jnp.float32)
