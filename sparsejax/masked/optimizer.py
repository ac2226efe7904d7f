"""``sparse``: any optax transformation, under masks.

After every ``optax.apply_updates`` a weight that its mask has not kept is exactly 0,
and so is everything of its shape that the wrapped optimiser stores for it. What belongs
to a weight is found by its place in the tree, never by the class of the state. A weight
that comes back starts from 0 with all of its moments at 0.

With an estimator other than ``masked`` the stored weights and moments stay dense, and
only ``effective`` is masked.
"""

import zlib
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax import masked, tree
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.criteria import Evidence
from sparsejax.masked.estimators import straight_through
from sparsejax.masked.plan import Target, targets
from sparsejax.masked.updaters import Rule
from sparsejax.partition import PARAMETERS, constrain
from sparsejax.typing import Array, Bool, Float, Int, PyTree

__all__ = ["Mask", "SparseState", "effective", "masks_of", "sparse"]


class Mask(nnx.Variable):
    """Which weights of a parameter are live; it has the parameter's ``axes``."""


class SparseState(NamedTuple):
    """State of ``sparse``: masks by path, beside the state of what it wraps."""

    step: Int[Array, ""]  # updates done
    masks: dict[str, Mask]
    inner: PyTree


def sparse(
    tx: optax.GradientTransformation, plan: MaskedConfig
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimiser so that it trains under the masks of a plan.

    Gradients must be those of ``effective`` weights: dense, whatever the estimator.
    Stacked parameters (leading axes ``l`` and ``e``) have a mask and an exact count for
    every layer. Masks change inside one ``lax.cond``; other steps only apply them.

    Raises:
        ValueError: from ``init``, if the plan does not fit the parameters; from
            ``update``, without ``params``.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> SparseState:
        arrays = tree.leaves(params)
        masks = {
            path: Mask(_initial(target, arrays[path], plan), axes=target.axes)
            for path, target in targets(params, plan).items()
        }
        with _foreign():
            return SparseState(jnp.zeros((), jnp.int32), masks, tx.init(params))

    def update(
        updates: PyTree, state: Any, params: Any = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "params=None: masks need the weights; pass params to update"
            )
        active = _active(params, plan)
        old = {path: state.masks[path][...] for path in active}
        stored = _stores_masked(plan)
        live = _where(old, updates) if stored else updates
        with _foreign():
            step = tx.update(live, state.inner, params, **extra)
        (step, inner), new = _next(plan, active, state, step, (params, updates))
        if stored:
            kept = {path: old[path] & new[path] for path in active}
            step = _stay_zero(kept, step, params)
            inner = _where(kept, inner, _owners(inner, tree.leaves(params)))
        changed: Any = {path: state.masks[path].replace(new[path]) for path in active}
        return step, SparseState(state.step + 1, state.masks | changed, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(opt_state: PyTree) -> dict[str, Mask]:
    """Collect the masks of every ``SparseState`` in an optimiser's state, by path.

    Raises:
        ValueError: if there is none.
    """
    is_state = lambda x: isinstance(x, SparseState)  # noqa: E731
    found: dict[str, Mask] = {}
    waiting = [opt_state]
    while waiting:
        for x in jax.tree.leaves(waiting.pop(), is_leaf=is_state):
            if is_state(x):
                found |= x.masks
                waiting.append(x.inner)
    if not found:
        raise ValueError(
            "this optimiser state has no masks; wrap it in sparse(tx, plan)"
        )
    return found


def effective(params: PyTree, opt_state: PyTree, plan: MaskedConfig) -> PyTree:
    """Give the weights that the model computes with: masked, with dense gradients.

    Values equal the stored ones where those are masked already, which is from the first
    update on. Their gradient is dense even then: updaters grow by it, and ``sparse``
    takes the live part.
    """
    estimate = partial(masked.ESTIMATORS[plan.estimator], **plan.estimator_arguments)
    if _stores_masked(plan):
        estimate = straight_through
    masks, active = masks_of(opt_state), _active(params, plan)

    def apply(path: str, x: Array) -> Array:
        return estimate(x, masks[path][...]) if path in active else x

    return tree.map_with_path(apply, params)


def _foreign() -> Any:
    """Relax promotion around optax, which mixes int32 and float."""
    return jax.numpy_dtype_promotion("standard")


def _stores_masked(plan: MaskedConfig) -> bool:
    return masked.ESTIMATORS[plan.estimator] is masked.ESTIMATORS["masked"]


def _is_due(step: Int[Array, ""], plan: MaskedConfig) -> Bool[Array, ""]:
    inside = (step >= plan.begin) & (step <= plan.end)
    return inside & ((step - plan.begin) % plan.every == 0)


def _per_layer(function: Any, target: Target) -> Any:
    """Map over the axes that stack layers."""
    for _ in target.stack:
        function = jax.vmap(function)
    return function


def _keys(target: Target, plan: MaskedConfig, step: int | Int[Array, ""]) -> Array:
    """One key a layer, a function of the seed, the step and the path alone."""
    key = jax.random.fold_in(jax.random.key(plan.seed), step)
    key = jax.random.fold_in(key, zlib.crc32(target.path.encode()))
    return jax.random.split(key, target.stack)


def _initial(
    target: Target, weight: Float[Array, "*shape"], plan: MaskedConfig
) -> Bool[Array, "*shape"]:
    keep = target.keep(masked.SCHEDULES[plan.schedule](-1, target.ramp))
    criterion = masked.CRITERIA[plan.initial_criterion]

    def one(weight: Array, key: Array) -> Array:
        return target.structure(criterion(Evidence(weight, None, key)), keep)

    # Step -1 has a key of its own: fold_in takes what would be 2**32 - 1.
    mask = _per_layer(one, target)(weight, _keys(target, plan, 2**32 - 1))
    return constrain(mask, target.axes, PARAMETERS)


def _active(params: PyTree, plan: MaskedConfig) -> dict[str, Target]:
    """Leave out what the plan keeps dense to the end: there, nothing is computed."""
    found = targets(params, plan)
    return {path: target for path, target in found.items() if not target.is_dense}


def _next(
    plan: MaskedConfig,
    active: dict[str, Target],
    state: SparseState,
    step: Any,
    given: tuple[PyTree, PyTree],
) -> tuple[Any, dict[str, Array]]:
    """Give the step that is taken and the masks after it.

    Args:
        plan: what to do.
        active: to which parameters.
        state: before the step.
        step: what the wrapped optimiser would do: its updates and its next state.
        given: the parameters before the step and their dense gradients.
    """
    old = {path: state.masks[path][...] for path in active}
    updater = masked.UPDATERS[plan.updater]
    if updater is masked.UPDATERS["static"] or not active:
        return step, old

    def change() -> tuple[Any, dict[str, Array]]:
        taken = step
        if updater in masked.REPLACES_STEP:
            taken = (jax.tree.map(jnp.zeros_like, step[0]), state.inner)
        weights, slopes, updates = map(tree.leaves, (*given, taken[0]))
        found = {}
        for path, target in active.items():
            weight: Any = optax.apply_updates(weights[path], updates[path])
            seen = Evidence(weight, slopes[path], _keys(target, plan, state.step))
            found[path] = _changed(target, plan, state.step, old[path], seen)
        return taken, found

    return jax.lax.cond(_is_due(state.step, plan), change, lambda: (step, old))


def _changed(
    target: Target,
    plan: MaskedConfig,
    step: Int[Array, ""],
    mask: Bool[Array, "*shape"],
    seen: Evidence,
) -> Bool[Array, "*shape"]:
    """Change the mask of every layer of one parameter."""
    keep = target.keep(masked.SCHEDULES[plan.schedule](step, target.ramp))
    # Cosine annealing of what moves, to 0 at the end of the schedule.
    turn = jnp.pi * step.astype(jnp.float32) / max(plan.end, 1)
    moved = target.moved(keep, plan.moved / 2 * (1 + jnp.cos(turn)))
    rule = Rule(target.structure, masked.CRITERIA[plan.criterion], keep, moved)

    def one(mask: Array, seen: Evidence) -> Array:
        return masked.UPDATERS[plan.updater](mask, seen, rule)

    return constrain(_per_layer(one, target)(mask, seen), target.axes, PARAMETERS)


def _where(
    masks: dict[str, Array], values: PyTree, owners: dict[str, str] | None = None
) -> PyTree:
    """Put 0 wherever the mask of a leaf's owner, by default itself, is not live."""

    def one(path: str, x: Array) -> Array:
        owner = path if owners is None else owners.get(path)
        return masked.ESTIMATORS["masked"](x, masks[owner]) if owner in masks else x

    return tree.map_with_path(one, values)


def _stay_zero(masks: dict[str, Array], updates: PyTree, params: PyTree) -> PyTree:
    """Make an update take every weight that is not kept to exactly 0."""
    weights = tree.leaves(params)

    def one(path: str, update: Array) -> Array:
        if path not in masks:
            return update
        kind = jnp.promote_types(update.dtype, weights[path].dtype)
        away = -weights[path].astype(kind)
        return jnp.where(masks[path], update.astype(kind), away)

    return tree.map_with_path(one, updates)


def _owners(inner: PyTree, params: dict[str, Array]) -> dict[str, str]:
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
