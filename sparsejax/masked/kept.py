"""What ``sparse`` remembers beside the masks, for the plans that ask for it.

``SparseState.kept`` is a dict with an entry for each: ``momentum`` and ``movement`` of
gradients, ``scale`` of soft thresholds, ``logits`` of learned masks and their ``adam``,
``early`` weights to rewind to, ``first`` masks and what was ``ever`` live. Whatever has
the shape of a parameter also has its axes, so it is cut and saved as that is.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import masked, tree
from sparsejax.masked.candidates import Learning, first_logits, learn, mixture
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.estimators import Now, scale_of
from sparsejax.masked.evidence import Trace, started, traced
from sparsejax.masked.plan import Target
from sparsejax.typing import Array, Bool, Int, PyTree

__all__ = [
    "begun",
    "clock",
    "fixed",
    "followed",
    "frozen",
    "horizon",
    "rewound",
    "tracked",
    "varying",
]

Targets = Mapping[str, Target]


def begun(
    plan: MaskedConfig,
    active: Targets,
    params: PyTree,
    inner: PyTree,
    masks: dict[str, Array],
) -> dict[str, Any]:
    """Start what is kept beside the initial masks.

    Raises:
        ValueError: if the optimiser lacks what the plan looks at.
    """
    arrays = tree.leaves(params)
    kept: dict[str, Any] = dict(started(plan, active, params, inner))
    if masked.ESTIMATORS[plan.estimator] is masked.ESTIMATORS["soft_threshold"]:
        kept["scale"] = {
            path: target.each(partial(scale_of, structure=target.structure))(
                arrays[path], masks[path]
            )
            for path, target in active.items()
        }
    if _learns(plan):
        logits = {p: _first_logits(plan, t, masks[p]) for p, t in active.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
            adam = optax.adam(_learning(plan).rate).init(logits)
        kept |= {"logits": logits, "adam": adam}
    if plan.rewind is not None:
        kept["early"] = (params, inner)
    if plan.track:
        for name in ("first", "ever"):
            kept[name] = {p: Trace(masks[p], axes=t.axes) for p, t in active.items()}
    return kept


def followed(
    plan: MaskedConfig, active: Targets, state: Any, params: PyTree, slopes: PyTree
) -> dict[str, Any]:
    """Let traces and logits follow the dense gradients of a step."""
    weights, given = tree.leaves(params), tree.leaves(slopes)
    kept = traced(state.kept, weights, given)
    if not _learns(plan):
        return kept
    layers = {}
    for path, target in active.items():
        softened = partial(_softened, plan, target, state.step)
        layers[path] = (softened, weights[path], given[path])
    logits, adam = learn(_learning(plan), layers, (kept["logits"], kept["adam"]))
    return kept | {"logits": logits, "adam": adam}


def frozen(plan: MaskedConfig, active: Targets, updates: PyTree) -> PyTree:
    """Leave weights alone while their masks are learned."""
    if not _learns(plan):
        return updates

    def one(path: str, update: Array) -> Array:
        return jnp.zeros_like(update) if path in active else update

    return tree.map_with_path(one, updates)


def rewound(
    plan: MaskedConfig,
    due: Bool[Array, ""],
    state: Any,
    step: tuple[PyTree, PyTree],
    params: PyTree,
) -> tuple[tuple[PyTree, PyTree], dict[str, Any]]:
    """Go back to the early weights, moments and counts whenever masks change.

    An update can do so only up to the rounding of one addition.

    Source: Frankle et al. 2019, arXiv:1903.01611, Alg. 1.
    """
    if plan.rewind is None:
        return step, state.kept
    now = (params, state.inner)
    early = jax.tree.map(
        lambda x, old: jnp.where(state.step == plan.rewind, x, old),
        now,
        state.kept["early"],
    )
    back = jax.tree.map(lambda e, p: e - p, early[0], params), early[1]
    step = jax.tree.map(lambda b, s: jnp.where(due, b.astype(s.dtype), s), back, step)
    return step, state.kept | {"early": early}


def clock(step: Int[Array, ""], plan: MaskedConfig) -> Int[Array, ""]:
    """Count the steps as a rewound optimiser does: it is back where it was."""
    if plan.rewind is None:
        return step
    last = (jnp.minimum(step - 1, plan.end) - plan.begin) // plan.every * plan.every
    since = step - 1 - (plan.begin + last)
    return jnp.where(step <= plan.begin, step, plan.rewind + since)


def horizon(plan: MaskedConfig | None, steps: int) -> int:
    """Give the steps that a learning rate's schedule sees of a run: of one cycle."""
    if plan is None or plan.rewind is None:
        return steps
    return min(steps, plan.rewind + plan.every)


def tracked(kept: dict[str, Any], masks: Mapping[str, Array]) -> dict[str, Any]:
    """Add what is live to what was ever live."""
    if "ever" not in kept:
        return kept
    ever = {p: x.replace(x[...] | masks[p]) for p, x in kept["ever"].items()}
    return kept | {"ever": ever}


def fixed(plan: MaskedConfig, target: Target) -> dict[str, Any]:
    """Give the fields of ``Now`` that all layers of a parameter share."""
    return {
        "begin": plan.begin,
        "end": plan.end,
        "keep": target.count(target.ramp.final),
        "structure": target.structure,
    }


def varying(plan: MaskedConfig, target: Target, state: Any) -> dict[str, Any]:
    """Give the fields of ``Now`` that each layer of a parameter has of its own."""
    found = {"key": target.keys(plan.seed, state.step)} if _learns(plan) else {}
    for name in ("scale", "logits"):
        if name in state.kept:
            found[name] = state.kept[name][target.path]
    return found


def _learns(plan: MaskedConfig) -> bool:
    return masked.UPDATERS[plan.updater] is masked.UPDATERS["learned"]


def _learning(plan: MaskedConfig) -> Learning:
    arguments: Any = plan.updater_arguments
    return Learning(**arguments)


def _first_logits(plan: MaskedConfig, target: Target, mask: Array) -> Array:
    def one(mask: Array, key: Array) -> Array:
        keep = target.count(target.ramp.final)
        prior = _learning(plan).prior
        return first_logits(mask, key, target.structure, keep, prior)

    # Step -2: the initial masks have the key of step -1.
    return target.each(one)(mask, target.keys(plan.seed, 2**32 - 2))


def _softened(plan: MaskedConfig, target: Target, step: Array, logits: Array) -> Array:
    def one(logits: Array, key: Array) -> Array:
        now = Now(step=step, key=key, **fixed(plan, target))
        return mixture(logits, now, target.shape)

    return target.each(one)(logits, target.keys(plan.seed, step))
