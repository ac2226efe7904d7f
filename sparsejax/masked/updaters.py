"""Updaters: a mask and the evidence in, the next mask out.

Every updater has the signature ``(mask, seen, rule) -> mask``, with arguments of its
own by keyword, and most are one set of arguments of ``prune_and_grow``. The mask that
it returns has exactly ``rule.keep`` weights; ``srigl``, which may give up whole
neurons, has as many as an equal number for each of the others allows.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax.masked.criteria import Evidence, gradient, momentum, random
from sparsejax.masked.structures import ConstantFanIn, Structure, best
from sparsejax.tree import longest_match
from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "Rule",
    "among",
    "prune",
    "prune_and_grow",
    "rigl",
    "select",
    "set_",
    "sparse_momentum",
    "srigl",
    "static",
]

Criterion = Callable[[Evidence], Float[Array, "*shape"]]
SALIENT = 0.3  # what ``srigl`` asks of neurons


class Rule(NamedTuple):
    """What the plan asks of this update of this layer."""

    structure: Structure
    criterion: Criterion  # what the weights are kept by
    keep: int | Int[Array, ""]  # live weights after the update
    moved: int | Int[Array, ""] = 0  # of those, how many are grown anew
    final: int = 0  # live weights at the end of the schedule
    path: str = ""  # of the layer's parameter


def prune_and_grow(
    mask: Bool[Array, "*shape"],
    seen: Evidence,
    rule: Rule,
    *,
    grow: Criterion,
) -> Bool[Array, "*shape"]:
    """Drop the worst of the live weights, then grow the best of all the others.

    What was just dropped may grow again. If fewer than ``keep - moved`` are live, all
    of them stay and more are grown.
    """
    live = jnp.sum(mask)
    stay = jnp.minimum(rule.keep - rule.moved, live)
    kept = rule.structure(among(mask, rule.criterion(seen)), stay)
    return kept | rule.structure(among(~kept, grow(seen)), rule.keep - stay)


def prune(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Keep the best of the live weights; what is dead stays dead.

    Only when the schedule asks for more than are live do others come back.
    """
    return prune_and_grow(mask, seen, rule._replace(moved=0), grow=rule.criterion)


def select(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Keep the best of all weights, whatever the mask was: pruning can be undone."""
    return prune(jnp.ones_like(mask), seen, rule)


def set_(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Grow anywhere, at random.

    Source: Mocanu et al. 2018, arXiv:1707.04780, Alg. 1. Departure: drops by size, not
    sign by sign, and what grows starts at 0.
    """
    return prune_and_grow(mask, seen, rule, grow=random)


def rigl(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Grow where the gradient of the loss is largest.

    Source: Evci et al. 2019, arXiv:1911.11134, Alg. 1. Departure: no noise is added to
    the sizes, ties go to the lower index.
    """
    return prune_and_grow(mask, seen, rule, grow=gradient)


def sparse_momentum(
    mask: Bool[Array, "*shape"], seen: Evidence, rule: Rule
) -> Bool[Array, "*shape"]:
    """Grow where the running mean of the gradient is largest.

    With ``allocation="momentum"``, layers of more momentum also get more of what grows.

    Source: Dettmers and Zettlemoyer 2019, arXiv:1907.04840, Sec. 3. Departure: the
    share that moves falls to 0, the count is exact.
    """
    return prune_and_grow(mask, seen, rule, grow=momentum)


def srigl(
    mask: Bool[Array, "*shape"],
    seen: Evidence,
    rule: Rule,
    *,
    salient: float | Mapping[str, float] = SALIENT,
) -> Bool[Array, "*shape"]:
    """Move weights as RigL does, every neuron with equally many, idle ones with none.

    Salient are the weights of the whole layer that RigL would keep or grow. Neurons
    with few of them are given up, and the others share the budget; each keeps its
    salient weights, largest first, and grows by the gradient to the common count.

    Source: Lasby et al. 2023, arXiv:2305.02299, Sec. 3.1. Departure: the fan-in that
    ``salient`` is a share of is the one that all neurons together would have.

    Args:
        mask: before.
        seen: weights and dense gradients.
        rule: its structure is a constant fan-in.
        salient: least share of a neuron's weights that has to be salient, by regexes of
            paths if it differs: the longest that a path matches. At 0 no neuron is
            given up.

    Raises:
        ValueError: if the structure is another.
    """
    structure = rule.structure
    if not isinstance(structure, ConstantFanIn):
        raise ValueError(  # noqa: TRY004
            f"srigl gives every neuron equally many weights, {structure} does not;"
            " choose structure='constant_fan_in'"
        )
    rows = structure.grouped(mask)
    size = among(rows, structure.grouped(rule.criterion(seen)))
    slope = among(jnp.ones_like(rows), structure.grouped(gradient(seen)))
    stay = jnp.minimum(rule.keep - rule.moved, jnp.sum(rows))
    kept = best(size.reshape(-1), stay).reshape(rows.shape)
    grown = best(slope.reshape(-1), rule.keep - stay).reshape(rows.shape)
    count = jnp.sum(kept | grown, axis=1)
    neurons, inputs = rows.shape
    least = _least(salient, rule.path, rule.keep // neurons)
    needed = best(count.astype(jnp.float32), -(-rule.keep // inputs))
    active = (count >= least) | needed
    each = rule.keep // jnp.maximum(jnp.sum(active), 1)
    # Salient weights by size come first, then all others by gradient.
    order = jnp.where(kept, inputs + _rank(size), _rank(slope)).astype(jnp.float32)
    chosen = best(order, each) & active[:, None]
    return structure.ungrouped(chosen, mask.shape)


def _least(
    salient: float | Mapping[str, float], path: str, usual: Any
) -> Int[Array, ""]:
    """Count the salient weights that a neuron of this path has to have."""
    if isinstance(salient, Mapping):
        salient = longest_match(salient, path, SALIENT)
    count = jnp.floor(salient * jnp.asarray(usual, jnp.float32))
    return jnp.maximum(count, 1 if salient > 0 else 0).astype(jnp.int32)


def static(
    mask: Bool[Array, "*shape"],
    seen: Evidence,  # noqa: ARG001
    rule: Rule,  # noqa: ARG001
) -> Bool[Array, "*shape"]:
    """Keep the mask that training began with."""
    return mask


def among(
    eligible: Bool[Array, "*shape"], scores: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Put everything else below the worst that is eligible, NaN included."""
    limit = 1e15  # its square, and sums of that, are finite
    finite = jnp.nan_to_num(scores, nan=-limit, posinf=limit, neginf=-limit)
    return jnp.where(eligible, finite, -jnp.inf)


def _rank(scores: Float[Array, "neurons inputs"]) -> Int[Array, "neurons inputs"]:
    """Count the scores of a row that are worse; of equal ones the later is."""
    order = jnp.argsort(scores[:, ::-1], axis=1, stable=True)
    return jnp.argsort(order, axis=1)[:, ::-1]
