"""``sparse``: any optax transformation, under masks.

After every ``optax.apply_updates`` a weight that its mask has not kept is exactly 0,
and so is everything of its shape that the wrapped optimiser stores for it. What belongs
to a weight is found by its place in the tree, never by the class of the state. A weight
that comes back starts from 0 with all of its moments at 0.

With an estimator other than ``masked`` the stored weights and moments stay dense, and
only ``effective`` is masked.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax import masked, tree
from sparsejax.masked import kept as keeping
from sparsejax.masked.blocked import multiplying
from sparsejax.masked.budgets import begins_dense, budgets
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.criteria import Evidence
from sparsejax.masked.estimators import Now, straight_through
from sparsejax.masked.evidence import FIELDS, Measured, moments, needs, owners
from sparsejax.masked.plan import Target, targets
from sparsejax.masked.structures import Structure
from sparsejax.masked.updaters import Rule
from sparsejax.partition import PARAMETERS, constrain
from sparsejax.typing import Array, Bool, Int, PyTree

__all__ = ["Mask", "SparseState", "effective", "masks_of", "sparse", "tracked_of"]


class Mask(nnx.Variable):
    """Which weights of a parameter are live; it has the parameter's ``axes``."""


class SparseState(NamedTuple):
    """State of ``sparse``: masks by path, beside the state of what it wraps."""

    step: Int[Array, ""]  # updates done
    masks: dict[str, Mask]
    inner: PyTree
    kept: dict[str, Any]  # what a plan remembers besides; most remember nothing


def sparse(
    tx: optax.GradientTransformation,
    plan: MaskedConfig,
    *,
    measured: Measured | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimiser so that it trains under the masks of a plan.

    Gradients must be those of ``effective`` weights: dense, whatever the estimator.
    Stacked parameters (leading axes ``l`` and ``e``) have a mask and an exact count for
    every layer. Masks change inside one ``lax.cond``; other steps only apply them.

    Args:
        tx: what to wrap.
        plan: which masks, and when.
        measured: derivatives at the initial weights, for initial masks that need them.

    Raises:
        ValueError: from ``init``, if the plan does not fit the parameters or the
            optimiser lacks what it looks at; from ``update``, without ``params``, or
            with masks of other shapes.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> SparseState:
        found, active = targets(params, plan), _active(params, plan)
        with _foreign():
            inner = tx.init(params)
        masks = _initial(found, params, plan, measured)
        kept = keeping.begun(plan, active, params, inner, masks)
        variables = {p: Mask(m, axes=found[p].axes) for p, m in masks.items()}
        return SparseState(jnp.zeros((), jnp.int32), variables, inner, kept)

    def update(
        updates: PyTree, state: Any, params: Any = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "params=None: masks need the weights; pass params to update"
            )
        active = _active(params, plan)
        _check_masks(active, state.masks)
        old = {path: state.masks[path][...] for path in active}
        live = _where(old, updates) if _stores_masked(plan) else updates
        with _foreign():
            step, inner = tx.update(live, state.inner, params, **extra)
        step = (keeping.frozen(plan, active, step), inner)
        return _masked_step(plan, active, state, step, (params, updates))

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(opt_state: PyTree) -> dict[str, Mask]:
    """Collect the masks of every ``SparseState`` in an optimiser's state, by path.

    Raises:
        ValueError: if there is none.
    """
    return {path: x for state in _states(opt_state) for path, x in state.masks.items()}


def tracked_of(opt_state: PyTree) -> dict[str, dict[str, Any]]:
    """Collect the first masks, and what was ever live, if the plan keeps ``track``.

    They are arguments of ``metrics``.
    """
    return {
        name: {p: x for s in _states(opt_state) for p, x in s.kept[name].items()}
        for name in ("first", "ever")
        if all(name in state.kept for state in _states(opt_state))
    }


def effective(
    params: PyTree, opt_state: PyTree, plan: MaskedConfig, *, training: bool = True
) -> PyTree:
    """Give the weights that the model computes with: masked, with dense gradients.

    Values equal the stored ones where those are masked already, which is from the first
    update on. Their gradient is dense even then: updaters grow by it, and ``sparse``
    takes the live part.

    Args:
        params: as stored.
        opt_state: has the masks.
        plan: of those masks.
        training: whether estimators that draw at random do so.
    """
    active = _active(params, plan)
    owner = {path: state for state in _states(opt_state) for path in state.masks}
    arguments = plan.estimator_arguments
    estimate = partial(masked.ESTIMATORS[plan.estimator], **arguments)

    def apply(path: str, x: Array) -> Any:
        if path not in active:
            return x
        state, target = owner[path], active[path]
        mask = state.masks[path][...]
        if _stores_masked(plan):
            due = is_due(state.step, plan) & training
            return multiplying(plan, target, straight_through(x, mask), mask, due)
        now = Now(step=state.step, training=training, **keeping.fixed(plan, target))
        varying = keeping.varying(plan, target, state)

        def one(weight: Array, mask: Array, varying: dict[str, Array]) -> Array:
            return estimate(weight, mask, now._replace(**varying))

        return target.each(one)(x, mask, varying)

    return tree.map_with_path(apply, params)


def is_due(step: Int[Array, ""], plan: MaskedConfig) -> Bool[Array, ""]:
    """Whether masks change in the update of a step."""
    inside = (step >= plan.begin) & (step <= plan.end)
    return inside & ((step - plan.begin) % plan.every == 0)


def _states(opt_state: PyTree) -> list[SparseState]:
    is_state = lambda x: isinstance(x, SparseState)  # noqa: E731
    found: list[SparseState] = []
    waiting = [opt_state]
    while waiting:
        for x in jax.tree.leaves(waiting.pop(), is_leaf=is_state):
            if is_state(x):
                found.append(x)
                waiting.append(x.inner)
    if not found:
        raise ValueError(
            "this optimiser state has no masks; wrap it in sparse(tx, plan)"
        )
    return found


def _foreign() -> Any:
    """Relax promotion around optax, which mixes int32 and float."""
    return jax.numpy_dtype_promotion("standard")


def _stores_masked(plan: MaskedConfig) -> bool:
    return masked.ESTIMATORS[plan.estimator] is masked.ESTIMATORS["masked"]


def _check_masks(active: Mapping[str, Target], masks: Mapping[str, Mask]) -> None:
    for path, target in active.items():
        shape = target.stack + target.shape
        found = masks[path].shape if path in masks else None
        if found != shape:
            raise ValueError(
                f"the mask of {path} has shape {found}, its parameter {shape}: this"
                " optimiser state is of another model or plan; begin with init"
            )


def _active(params: PyTree, plan: MaskedConfig) -> dict[str, Target]:
    """Leave out what the plan keeps dense to the end: there, nothing is computed."""
    found = targets(params, plan)
    return {path: target for path, target in found.items() if not target.is_dense}


def _initial(
    found: Mapping[str, Target],
    params: PyTree,
    plan: MaskedConfig,
    measured: Measured | None,
) -> dict[str, Array]:
    arrays = tree.leaves(params)
    if begins_dense(plan):  # and no program that chooses has to be compiled
        full = {path: jnp.ones_like(arrays[path], bool) for path in found}
        return {p: constrain(full[p], t.axes, PARAMETERS) for p, t in found.items()}
    given = [tree.leaves(x) for x in measured or ({}, {})]
    seen = {}
    for path, target in found.items():
        # Step -1 has a key of its own: fold_in takes what would be 2**32 - 1.
        keys = target.keys(plan.seed, 2**32 - 1)
        gradient, curvature = (x.get(path) for x in given)
        seen[path] = Evidence(arrays[path], gradient, keys, curvature=curvature)
    masks = {p: jnp.ones_like(arrays[p], bool) for p in found}
    budget = budgets(plan, found, -1, masks, seen)
    criterion, updater = (
        masked.CRITERIA[plan.initial_criterion],
        masked.UPDATERS["select"],
    )
    rules = {
        p: (t.structure_at(-1), criterion, updater, budget[p]) for p, t in found.items()
    }
    return {p: _changed(t, rules[p], masks[p], seen[p]) for p, t in found.items()}


def _masked_step(
    plan: MaskedConfig,
    active: Mapping[str, Target],
    state: SparseState,
    step: Any,
    given: tuple[PyTree, PyTree],
) -> tuple[PyTree, SparseState]:
    """Take the step under the masks that it leads to; the arguments are ``_next``'s."""
    params = given[0]
    old = {path: state.masks[path][...] for path in active}
    state = state._replace(kept=keeping.followed(plan, active, state, *given))
    step, new = _next(plan, active, state, step, given)
    due = is_due(state.step, plan)
    (step, inner), kept = keeping.rewound(plan, due, state, step, params)
    if _stores_masked(plan):
        both = {path: old[path] & new[path] for path in active}
        step = _stay_zero(both, step, params)
        inner = _where(both, inner, owners(inner, tree.leaves(params)))
    kept = keeping.tracked(kept, new)
    changed: Any = {path: state.masks[path].replace(new[path]) for path in active}
    return step, SparseState(state.step + 1, state.masks | changed, inner, kept)


def _next(
    plan: MaskedConfig,
    active: Mapping[str, Target],
    state: SparseState,
    step: Any,
    given: tuple[PyTree, PyTree],
) -> tuple[Any, dict[str, Array]]:
    """Give the step that is taken and the masks after it.

    Args:
        plan: what to do.
        active: to which parameters.
        state: before the step, but what is kept is already after it.
        step: what the wrapped optimiser would do: its updates and its next state.
        given: the parameters before the step and their dense gradients.
    """
    old = {path: state.masks[path][...] for path in active}
    updater = masked.UPDATERS[plan.updater]
    changes = active and updater is not masked.UPDATERS["static"]
    full = {path: jnp.ones_like(mask) for path, mask in old.items()}

    def change() -> tuple[Any, dict[str, Array]]:
        taken = step
        if updater in masked.REPLACES_STEP:
            taken = (jax.tree.map(jnp.zeros_like, step[0]), _idle(state.inner, step[1]))
        seen = _evidence(plan, active, state, taken, given)
        budget = budgets(plan, active, state.step, old, seen)
        criterion = masked.CRITERIA[plan.criterion]
        update = partial(updater, **plan.updater_arguments)
        found = {}
        for path, target in active.items():
            how = (target.structure_at(state.step), criterion, update, budget[path])
            found[path] = _changed(target, how, old[path], seen[path])
        return taken, found

    if changes:
        step, new = jax.lax.cond(is_due(state.step, plan), change, lambda: (step, old))
    else:
        new = old
    if plan.dense_from is None:
        return step, new
    opened = state.step >= plan.dense_from
    return step, {p: jnp.where(opened, full[p], new[p]) for p in new}


def _idle(before: PyTree, after: PyTree) -> PyTree:
    """Give the optimiser's state without its step; the rate's schedule still goes on.

    Moments and their counts stay: it is steps of the run that a schedule counts.
    Gradients that are accumulated still are, and let go when it is their turn.
    """
    inside = {
        optax.InjectStatefulHyperparamsState: "inner_state",
        optax.MultiStepsState: "inner_opt_state",
    }

    def goes_on(x: Any) -> bool:
        return isinstance(x, (optax.ScaleByScheduleState, *inside))

    def kept(old: PyTree, new: PyTree) -> PyTree:
        if name := inside.get(type(old)):
            inner = _idle(getattr(old, name), getattr(new, name))
            return new._replace(**{name: inner})
        return new if goes_on(old) else old

    return jax.tree.map(kept, before, after, is_leaf=goes_on)


def _evidence(
    plan: MaskedConfig,
    active: Mapping[str, Target],
    state: SparseState,
    taken: Any,
    given: tuple[PyTree, PyTree],
) -> dict[str, Evidence]:
    """Collect what is known of the weights after the step that is taken."""
    weights, slopes, updates = map(tree.leaves, (*given, taken[0]))
    known = {
        name: {path: x[...] for path, x in state.kept[name].items()}
        for name in ("momentum", "movement", "logits")
        if name in state.kept
    }
    for name in needs(plan) & set(FIELDS) - set(known):
        known[name] = moments(taken[1], given[0], name, active)
    found = {}
    for path, target in active.items():
        weight: Any = optax.apply_updates(weights[path], updates[path])
        extra: Any = {name: values[path] for name, values in known.items()}
        keys = target.keys(plan.seed, state.step)
        found[path] = Evidence(weight, slopes[path], keys, **extra)
    return found


def _changed(
    target: Target,
    how: tuple[Structure, Any, Any, Any],
    mask: Bool[Array, "*shape"],
    seen: Evidence,
) -> Bool[Array, "*shape"]:
    """Change the mask of every layer of one parameter."""
    structure, criterion, updater, budget = how
    final = target.count(target.ramp.final)

    def one(mask: Array, seen: Evidence, budget: Any) -> Array:
        keep, moved = budget
        rule = Rule(structure, criterion, keep, moved, final, target.path)
        return updater(mask, seen, rule)

    mask = target.each(one)(mask, seen, budget)
    return constrain(mask, target.axes, PARAMETERS)


def _where(
    masks: Mapping[str, Array], values: PyTree, owner: dict[str, str] | None = None
) -> PyTree:
    """Put 0 wherever the mask of a leaf's owner, by default itself, is not live."""

    def one(path: str, x: Array) -> Array:
        name = path if owner is None else owner.get(path, "")
        return masked.ESTIMATORS["masked"](x, masks[name]) if name in masks else x

    return tree.map_with_path(one, values)


def _stay_zero(masks: Mapping[str, Array], updates: PyTree, params: PyTree) -> PyTree:
    """Make an update take every weight that is not kept to exactly 0."""
    weights = tree.leaves(params)

    def one(path: str, update: Array) -> Array:
        if path not in masks:
            return update
        kind = jnp.promote_types(update.dtype, weights[path].dtype)
        away = -weights[path].astype(kind)
        return jnp.where(masks[path], update.astype(kind), away)

    return tree.map_with_path(one, updates)
