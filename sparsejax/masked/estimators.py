"""Estimators: the weights that the model uses, and what their gradient becomes.

Every estimator has the signature ``(weight, mask, now) -> weight``, for one layer, with
arguments of its own by keyword. Where the mask is live the value follows the stored
weight. Elsewhere it is exactly 0, whatever is stored there, from the end of the plan's
schedule on; ``mask_decay`` and ``gumbel`` get there gradually.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.masked.structures import Structure, Unstructured
from sparsejax.typing import Array, Bool, Float, Int, PRNGKeyArray

__all__ = [
    "Now",
    "exponential_mask_decay",
    "mask_decay",
    "masked",
    "scale_of",
    "soft_threshold",
    "sr_ste",
    "straight_through",
    "top_kast",
]


class Now(NamedTuple):
    """What an estimator may know of a layer beside its weights and mask."""

    step: int | Int[Array, ""] = 0  # updates done
    begin: int = 0  # of the plan's schedule
    end: int = 0
    keep: int = 0  # live weights at the end
    structure: Structure = Unstructured()
    training: bool = True  # not so when the model is evaluated or used
    scale: Float[Array, ""] | None = None  # of soft thresholds
    logits: Float[Array, "groups candidates"] | None = None  # of learned masks
    key: PRNGKeyArray | None = None  # of this step and layer

    @property
    def progress(self) -> Float[Array, ""]:
        """Give how much of the schedule has passed, from 0 to 1."""
        passed = jnp.asarray(self.step - self.begin, jnp.float32)
        share = jnp.clip(passed / max(self.end - self.begin, 1), 0, 1)
        return jnp.where(jnp.asarray(self.step) >= self.end, jnp.float32(1), share)


ANY = Now()  # what there is to know when nothing is given


def masked(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,  # noqa: ARG001
) -> Float[Array, "*shape"]:
    """Pass the gradient to live weights only."""
    return jnp.where(mask, weight, jnp.zeros_like(weight))


def straight_through(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,  # noqa: ARG001
) -> Float[Array, "*shape"]:
    """Pass the whole gradient, as if nothing had been masked.

    Source: Bengio et al. 2013, arXiv:1308.3432, Sec. 3.
    """
    return passed(weight, masked(weight, mask))


def sr_ste(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,  # noqa: ARG001
    *,
    decay: float = 2e-4,
) -> Float[Array, "*shape"]:
    """Pass the whole gradient, and pull the masked weights towards 0.

    The gradient is ``g + decay (1 - mask) weight``: what is masked stays masked more
    often, so the mask settles. An adaptive optimiser scales the pull like the gradient.

    Source: Zhou et al. 2021, arXiv:2102.04010, Sec. 3.3; Hu et al. 2024,
    arXiv:2404.01847, Sec. 4.2.

    Args:
        weight: as stored, dense.
        mask: what is live.
        now: not used.
        decay: strength of the pull, in units of gradient per weight.
    """
    pull = masked(weight, ~mask) * jnp.asarray(decay, weight.dtype)
    return passed(weight, masked(weight, mask), pull=pull)


def mask_decay(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,
) -> Float[Array, "*shape"]:
    """Let masked weights count for less and less, linearly from begin to end.

    Source: Bambhaniya et al. 2024, arXiv:2402.04744, Sec. 4.1.
    """
    return passed(weight, _leaking(weight, mask, 1 - now.progress))


def exponential_mask_decay(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,
    *,
    rate: float = 2e-4,
) -> Float[Array, "*shape"]:
    """Let masked weights count for ``exp(-rate steps)`` of theirs, and 0 at the end.

    Source: Bambhaniya et al. 2024, arXiv:2402.04744, Sec. 4.1.
    """
    steps = jnp.maximum(jnp.asarray(now.step - now.begin, jnp.float32), 0)
    share = jnp.where(now.progress < 1, jnp.exp(-rate * steps), 0)
    return passed(weight, _leaking(weight, mask, share))


def soft_threshold(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,
) -> Float[Array, "*shape"]:
    """Shrink each group by the largest size that its mask drops: no jumps as it flips.

    What shrinking takes off the whole layer, a scale that is fixed at the start gives
    back: ``<w, s> / <s, s>`` for the shrunk weights ``s``.

    Source: Hu et al. 2024, arXiv:2409.09099, Sec. 4.
    """
    value = _shrunk(weight, mask, now.structure)
    if now.scale is not None:
        value = value * now.scale.astype(weight.dtype)
    return passed(weight, value)


def top_kast(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,
    *,
    backward: float,
    decay: float = 1e-4,
) -> Float[Array, "*shape"]:
    """Compute with the live weights, train some more: the largest at a higher density.

    What is trained decays; where it is not live, by as many times more as the mask is
    sparse, so that it becomes live soon or falls behind.

    Source: Jayakumar et al. 2021, arXiv:2106.03517, Sec. 2. Departure: the weights that
    get no gradient still follow the optimiser's moments and its own weight decay.

    Args:
        weight: as stored, dense.
        mask: what is live.
        now: gives the structure.
        backward: density of what is trained.
        decay: in units of gradient per weight.
    """
    quantum = now.structure.quantum(weight.shape)
    keep = round(backward * math.prod(weight.shape) / quantum) * quantum
    trained = mask | now.structure(jnp.abs(weight).astype(jnp.float32), keep)
    density = jnp.mean(mask, dtype=jnp.float32)
    strength = decay * jnp.where(mask, 1, 1 / density)
    pull = masked(weight, trained) * strength.astype(weight.dtype)
    return passed(weight, masked(weight, mask), reaches=trained, pull=pull)


def scale_of(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    structure: Structure,
) -> Float[Array, ""]:
    """Give the scale that brings shrunk weights nearest to the weights."""
    whole = weight.astype(jnp.float32)
    shrunk = _shrunk(whole, mask, structure)
    square = jnp.sum(shrunk * shrunk)
    return jnp.where(square > 0, jnp.sum(whole * shrunk) / square, jnp.float32(1))


def passed(
    weight: Array,
    value: Array,
    *,
    reaches: Array | None = None,
    pull: Array | None = None,
) -> Array:
    """Give ``value``, with the gradient going to ``weight`` where it ``reaches``.

    Args:
        weight: as stored.
        value: what the model uses; no gradient goes through it.
        reaches: where the gradient goes; everywhere if None.
        pull: added to the gradient; nothing if None.
    """
    return _passed(weight, value, reaches, pull)


@jax.custom_vjp
def _passed(weight: Array, value: Array, reaches: Any, pull: Any) -> Array:
    del weight, reaches, pull
    return value


def _passed_forward(weight: Array, value: Array, reaches: Any, pull: Any) -> Any:
    return _passed(weight, value, reaches, pull), (reaches, pull)


def _passed_backward(saved: Any, g: Array) -> tuple[Array, None, None, None]:
    reaches, pull = saved
    if reaches is not None:
        g = masked(g, reaches)
    return g if pull is None else g + pull, None, None, None


_passed.defvjp(_passed_forward, _passed_backward)


def _leaking(weight: Array, mask: Array, share: Array) -> Array:
    """Give masked weights a share of their value; exactly 0 of it if that is 0."""
    part = jnp.where(share > 0, weight * share.astype(weight.dtype), 0)
    return jnp.where(mask, weight, part)


def _shrunk(weight: Array, mask: Array, structure: Structure) -> Array:
    groups: Any = structure
    dropped = groups.grouped(jnp.abs(masked(weight, ~mask)))
    level = jnp.broadcast_to(jnp.max(dropped, axis=-1, keepdims=True), dropped.shape)
    less = jnp.abs(weight) - groups.ungrouped(level, weight.shape)
    return masked(jnp.sign(weight) * jnp.maximum(less, 0), mask)
