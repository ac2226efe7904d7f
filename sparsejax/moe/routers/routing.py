"""What a router is: scores of tokens for experts in, an assignment out.

Every router is a pure function ``(scores, *, k, ...) -> Routing`` of float32 "n e"; it
owns no parameters and no state. What else it reads, it names:

- its first parameter names where the scores come from, a name of ``SOURCES``:
  ``logits`` of a linear map, ``cosines`` in a small learned space, ``similarities`` to
  running means, ``blank`` for a router that looks at none;
- keywords in ``CONTEXT`` are what the layer is called with: ids, positions, padding;
- keywords in ``SOURCES`` are what the layer owns, parameters or state, and reads for
  it: the balancing ``bias``, the ``noise`` scale, the L1 ``penalty``;
- all other keywords are settings, with defaults, that a config may set.

``key`` is a random key in training and None otherwise, so it also tells the two apart.
``bias`` moves the choice of experts and never their weights. The experts of a token's
used slots are distinct; a slot of weight 0 is unused, and a router that decides how
many experts a token visits has a slot for each expert. Ties go to the lower index.

A router that is to read something else, the map of the preceding attention, the state
of the layer before, a policy with a loss of its own, names it; whoever has it adds it
to ``CONTEXT`` or ``SOURCES``, and no other router changes.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.ranking import best
from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "CONTEXT",
    "Router",
    "Routing",
    "accepts",
    "check_count",
    "choose",
    "everywhere",
    "keep_groups",
    "pick",
    "settings",
    "shares",
    "valid_mean",
]

# tokens, previous " n" (ids of the input, and those before them), positions " n" in
# the document, valid " n" (not padding), batch (how many sequences the tokens are of).
CONTEXT = ("tokens", "previous", "positions", "valid", "batch", "key")


class Routing(NamedTuple):
    """Which experts each token visits, and with what weight."""

    experts: Int[Array, "n k"]
    weights: Float[Array, "n k"]  # float32; 0 marks an unused slot
    probs: Float[Array, "n e"]  # float32 rows that sum to one: what balancing sees
    losses: dict[str, Float[Array, ""]]  # a router's own, already weighted


Router = Callable[..., Routing]


def accepts(router: Router) -> set[str]:
    """Say what a router reads: where its scores come from, and keywords."""
    first, *rest = inspect.signature(router).parameters.values()
    return {first.name} | {p.name for p in rest if p.default is None}


def settings(router: Router) -> dict[str, Any]:
    """Give a router's own settings, with their defaults."""
    parameters = list(inspect.signature(router).parameters.values())[1:]
    return {
        p.name: p.default
        for p in parameters
        if p.name != "k" and p.default is not None and p.default is not p.empty
    }


def check_count(k: int, experts: int) -> None:
    """Raise unless a token can visit ``k`` different experts."""
    if not 1 <= k <= experts:
        raise ValueError(
            f"k={k}: a token visits at least one and at most all of the {experts}"
            " experts"
        )


def choose(
    scores: Float[Array, "n e"], k: int, bias: Float[Array, " e"] | None = None
) -> Int[Array, "n k"]:
    """Pick the ``k`` best experts of each token."""
    check_count(k, scores.shape[1])
    if bias is not None:
        scores = scores + bias[None]
    return best(jax.lax.stop_gradient(scores), k)


def keep_groups(
    scores: Float[Array, "n e"], k: int, groups: int, kept: int, *, judged_by: int
) -> Float[Array, "n e"]:
    """Set the scores outside the ``kept`` best groups to minus infinity.

    Args:
        groups: consecutive equal parts of the experts.
        judged_by: how many of its best experts a group is judged by, together.

    Raises:
        ValueError: if the groups are not equal or leave fewer than ``k`` experts.
    """
    tokens, experts = scores.shape
    check_count(k, experts)
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
    judges = pick(parts, best(parts, min(judged_by, size)))
    winners = best(judges.sum(axis=1).reshape(tokens, groups), kept)
    parts = parts.reshape(tokens, groups, size)
    live = (winners[:, :, None] == jnp.arange(groups)[None, None]).any(axis=1)
    # Not zero: a biased score below zero would lose to an expert outside its groups.
    return jnp.where(live[:, :, None], parts, -jnp.inf).reshape(tokens, experts)


def pick(scores: Float[Array, "n e"], chosen: Int[Array, "n k"]) -> Float[Array, "n k"]:
    """Look up the scores of the chosen experts."""
    return jnp.take_along_axis(scores, chosen, axis=1)


def everywhere(weights: Float[Array, "n e"]) -> Int[Array, "n e"]:
    """Give every expert a slot, in order; weights of 0 leave slots unused."""
    return jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)


def shares(scores: Float[Array, "n e"]) -> Float[Array, "n e"]:
    """Divide what is not negative by its row's sum; a row of zeros becomes uniform."""
    total = scores.sum(axis=1, keepdims=True)
    nothing = total <= 0
    return jnp.where(
        nothing, 1 / scores.shape[1], scores / jnp.where(nothing, 1, total)
    )


def valid_mean(
    values: Float[Array, "n *rest"], valid: Bool[Array, " n"] | None
) -> Float[Array, "*rest"]:
    """Average over the valid tokens; 0 if there are none."""
    if valid is None:
        return values.sum(axis=0) / max(values.shape[0], 1)
    live = valid.reshape(valid.shape + (1,) * (values.ndim - 1))
    count = jnp.maximum(valid.sum(), 1).astype(values.dtype)
    return jnp.where(live, values, 0).sum(axis=0) / count
