"""Budgets: how many weights each layer keeps, and moves, when masks change.

Usually both follow from a layer's own density. Under an allocation that ranks, one
ranking over all layers decides; under one that shares, what is dropped anywhere grows
where there is more of something.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax import masked
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.criteria import Evidence
from sparsejax.masked.plan import Target
from sparsejax.masked.structures import best
from sparsejax.masked.updaters import among
from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["Budget", "begins_dense", "budgets", "split"]


class Budget(NamedTuple):
    """Of every layer in a stack."""

    keep: Int[Array, "*stack"]  # live weights after the change
    moved: Int[Array, "*stack"]  # of those, how many are grown anew


def budgets(
    plan: MaskedConfig,
    active: Mapping[str, Target],
    step: int | Int[Array, ""],
    masks: Mapping[str, Bool[Array, "..."]],
    seen: Mapping[str, Evidence],
) -> dict[str, Budget]:
    """Give the budget of every parameter's layers; step -1 is before the first."""
    schedule, found = masked.SCHEDULES[plan.schedule], {}
    # Cosine annealing of what moves, to 0 at the end of the schedule.
    turn = jnp.pi * jnp.asarray(step).astype(jnp.float32) / max(plan.end, 1)
    fraction = plan.moved / 2 * (1 + jnp.cos(turn))
    for path, target in active.items():
        keep = target.keep(schedule(step, target.ramp))
        moved = target.moved(keep, fraction)
        found[path] = Budget(
            *(jnp.broadcast_to(x, target.stack) for x in (keep, moved))
        )
    allocation = masked.ALLOCATIONS[plan.allocation]
    if allocation in masked.RANKED_BY:
        first = masked.CRITERIA[
            plan.initial_criterion if isinstance(step, int) else plan.criterion
        ]
        criterion = masked.RANKED_BY[allocation] or first
        return _ranked(active, found, masks, seen, criterion)
    if allocation in masked.SHARED_BY and not isinstance(step, int):
        strength = masked.SHARED_BY[allocation]
        return _shared(active, found, masks, seen, (strength, fraction))
    return found


def begins_dense(plan: MaskedConfig) -> bool:
    """Tell whether every weight is live before the first step."""
    return plan.initial == 1 and plan.schedule not in masked.STEADY


def split(
    total: Int[Array, ""], strength: Float[Array, " n"], room: Int[Array, " n"]
) -> Int[Array, " n"]:
    """Share ``total`` in proportion to strength, none above its room, nothing lost.

    What does not fit goes to the others in proportion; what is left by rounding to the
    largest remainders, the lower index first.
    """
    peak = jnp.max(strength)
    weight = jnp.where(peak > 0, jnp.maximum(strength / peak, 1e-12), 1.0)
    wide = room.astype(jnp.float32)
    # Those that fill up first; the scale is right where it fills no other.
    order = jnp.argsort(wide / weight)
    full = jnp.cumsum(wide[order]) - wide[order]
    open_ = jnp.cumsum(weight[order][::-1])[::-1]
    scales = (total.astype(jnp.float32) - full) / open_
    fits = scales <= (wide / weight)[order]
    scale = jnp.where(jnp.any(fits), scales[jnp.argmax(fits)], jnp.inf)
    # A little less, lest rounding give more than there is.
    exact = jnp.clip(jnp.minimum(wide, scale * (1 - 1e-6) * weight), 0, None)
    given = jnp.minimum(jnp.floor(exact).astype(jnp.int32), room)
    left = jnp.maximum(total - jnp.sum(given), 0)
    one = best(
        jnp.where(given < room, exact - given.astype(jnp.float32), -1.0), left
    ) & (given < room)
    given = given + one.astype(jnp.int32)
    # Beyond float32 more may be left than there are layers: fill in order.
    left, free = total - jnp.sum(given), room - given
    before = jnp.cumsum(free) - free
    return given + jnp.clip(left - before, 0, free)


def _ranked(
    active: Mapping[str, Target],
    found: dict[str, Budget],
    masks: Mapping[str, Array],
    seen: Mapping[str, Evidence],
    criterion: Any,
) -> dict[str, Budget]:
    """Keep the units that are best among those of all layers, if they are eligible."""
    units, total = [], jnp.zeros((), jnp.int32)
    for path, target in active.items():
        structure: Any = target.structure

        def one(mask: Array, seen: Evidence, structure: Any = structure) -> Array:
            return structure.units(among(mask, criterion(seen)))

        units.append(target.each(one)(masks[path], seen[path]))
        quantum = structure.quantum(target.shape)
        total = total + jnp.sum(found[path].keep // quantum)
    live = best(jnp.concatenate([x.reshape(-1) for x in units]), total)
    given, start = {}, 0
    for x, (path, target) in zip(units, active.items(), strict=True):
        part = live[start : start + x.size].reshape(x.shape)
        keep = jnp.sum(part, axis=-1) * target.structure.quantum(target.shape)
        given[path] = Budget(keep.astype(jnp.int32), jnp.zeros_like(keep))
        start += x.size
    return given


def _shared(
    active: Mapping[str, Target],
    found: dict[str, Budget],
    masks: Mapping[str, Array],
    seen: Mapping[str, Evidence],
    how: tuple[Any, Array],
) -> dict[str, Budget]:
    """Drop a fraction in every layer, grow as many in proportion to a mean score."""
    criterion, fraction = how
    stay, room, strength = [], [], []
    for path, target in active.items():
        axes = tuple(range(len(target.stack), masks[path].ndim))
        live = jnp.sum(masks[path], axis=axes, dtype=jnp.int32)
        scores = target.each(criterion)(seen[path])
        total = jnp.sum(jnp.where(masks[path], scores, 0), axis=axes)
        count = jnp.maximum(live, 1).astype(jnp.float32)
        strength.append(jnp.reshape(total / count, -1))
        stay.append(jnp.reshape(live - target.moved(live, fraction), -1))
        room.append(target.size - stay[-1])
    total = sum(jnp.sum(b.keep) for b in found.values())
    total = total - sum(jnp.sum(x) for x in stay)
    grown = split(jnp.asarray(total), *map(jnp.concatenate, (strength, room)))
    given, start = {}, 0
    for kept, (path, target) in zip(stay, active.items(), strict=True):
        part = grown[start : start + kept.size]
        start += kept.size
        given[path] = Budget(*(x.reshape(target.stack) for x in (kept + part, part)))
    return given
