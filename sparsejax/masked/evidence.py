"""Where evidence comes from: the optimiser's state, what ``sparse`` keeps, a measure.

Moments are found in the state of any optax transformation by their place in its tree:
below a field named as optax names them, at the path and of the shape of the parameter.
What no optimiser has, ``sparse`` keeps beside the masks, for masked parameters only.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax import masked, tree
from sparsejax.masked.budgets import begins_dense
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.plan import Target
from sparsejax.typing import Array, PyTree

__all__ = [
    "Measured",
    "Trace",
    "measure",
    "measures",
    "moments",
    "owners",
    "started",
    "traced",
]

# What optax calls them, the first that there is: Adam, Lion and Muon, SGD, Adan; Adam,
# Adan, whose v is another thing, Adafactor, whose ema is of updates, not of gradients.
FIELDS = {"momentum": ("mu", "trace", "m"), "variance": ("nu", "n", "v")}
DECAY = 0.9  # of the momentum that is kept for weights without one


class Trace(nnx.Variable):
    """What is remembered of a parameter's gradients; it has the parameter's axes."""


class Measured(NamedTuple):
    """Derivatives at the initial weights, trees like them."""

    gradient: PyTree
    curvature: PyTree  # the Hessian times the gradient; empty if not measured


def measure(
    loss: Callable[[PyTree], Array], params: PyTree, *, curvature: bool = True
) -> Measured:
    """Differentiate a loss, for masks that are chosen before the first step.

    Args:
        loss: of the parameters alone; over one batch or many.
        params: where to measure.
        curvature: whether to do so twice.
    """
    gradient = jax.grad(loss)
    slope = gradient(params)
    if not curvature:
        return Measured(slope, {})
    return Measured(slope, jax.jvp(gradient, (params,), (slope,))[1])


def measures(plan: MaskedConfig) -> set[str]:
    """Name the derivatives that the first masks of a plan are chosen by."""
    if begins_dense(plan):
        return set()
    members: list[Any] = [masked.CRITERIA[plan.initial_criterion]]
    members.append(masked.RANKED_BY.get(masked.ALLOCATIONS[plan.allocation]))
    return {masked.MEASURED[member] for member in members if member in masked.MEASURED}


def needs(plan: MaskedConfig) -> set[str]:
    """Name the evidence that a plan's mask changes look at, beside gradients."""
    members = (
        masked.CRITERIA[plan.criterion],
        masked.ALLOCATIONS[plan.allocation],
        masked.UPDATERS[plan.updater],
    )
    return {masked.NEEDS[member] for member in members if member in masked.NEEDS}


def _traces(plan: MaskedConfig) -> set[str]:
    """Name what ``sparse`` has to keep: dead weights have no moments elsewhere."""
    grows_by = masked.NEEDS.get(masked.UPDATERS[plan.updater])
    shares_by = masked.NEEDS.get(masked.ALLOCATIONS[plan.allocation])
    return needs(plan) & ({"movement", grows_by, shares_by} - {"logits", None})


def started(
    plan: MaskedConfig, active: Mapping[str, Target], params: PyTree, inner: PyTree
) -> dict[str, dict[str, Trace]]:
    """Begin the traces; ask the optimiser's state for the rest, so that it fails early.

    Raises:
        ValueError: if the state has no such moment of some masked parameter.
    """
    arrays = tree.leaves(params)
    found = {}
    for name in sorted(_traces(plan)):
        found[name] = {
            path: Trace(jnp.zeros_like(arrays[path], jnp.float32), axes=target.axes)
            for path, target in active.items()
        }
    for name in needs(plan) & set(FIELDS) - set(found):
        moments(inner, params, name, active)
    return found


def traced(
    kept: Mapping[str, Any], weights: Mapping[str, Array], slopes: Mapping[str, Array]
) -> dict[str, Any]:
    """Advance the traces by one step, from its weights and their dense gradients."""
    rules = {
        "movement": lambda old, w, g: old - w * g,
        "momentum": lambda old, w, g: DECAY * old + (1 - DECAY) * g,  # noqa: ARG005
    }
    found = dict(kept)
    for name in set(rules) & set(kept):
        found[name] = {
            path: old.replace(
                rules[name](
                    old[...],
                    weights[path].astype(jnp.float32),
                    slopes[path].astype(jnp.float32),
                )
            )
            for path, old in kept[name].items()
        }
    return found


def moments(
    inner: PyTree, params: PyTree, name: str, paths: Mapping[str, Any]
) -> dict[str, Array]:
    """Find ``momentum`` or ``variance`` of every path in an optimiser's state.

    Adamax and SM3 give one of these names to something else: do not ask theirs.

    Raises:
        ValueError: if one is not there.
    """
    leaves, found = tree.leaves(inner), {}
    owned = owners(inner, tree.leaves(params))
    for field in FIELDS[name]:
        for path, owner in owned.items():
            if f"/{path}".removesuffix(f"/{owner}").endswith(f"/{field}"):
                found.setdefault(owner, leaves[path])
    missing = [path for path in paths if path not in found]
    if missing:
        raise ValueError(
            f"{name}: the optimiser's state has no {' or '.join(FIELDS[name])} of the"
            f" shape of {missing[0]}; choose an optimiser that keeps it (adamw does),"
            " or another criterion"
        )
    return {path: found[path] for path in paths}


def owners(inner: PyTree, params: Mapping[str, Array]) -> dict[str, str]:
    """Find which parameter each leaf of a state belongs to, by path and shape.

    A leaf may end with the paths of two parameters: ``mu/a/w`` with ``w`` and ``a/w``.
    The right one is that whose prefix, here ``mu``, is common to most leaves.
    """
    candidates: dict[str, list[tuple[str, str]]] = {}
    for path, x in tree.leaves(inner).items():
        parts = path.split("/")
        ends = [("/".join(parts[:i]), "/".join(parts[i:])) for i in range(len(parts))]
        candidates[path] = [
            (prefix, name)
            for prefix, name in ends
            if name in params and params[name].shape == jnp.shape(x)
        ]
    common = Counter(prefix for found in candidates.values() for prefix, _ in found)
    return {
        path: max(found, key=lambda pair: (common[pair[0]], len(pair[1])))[1]
        for path, found in candidates.items()
        if found
    }
