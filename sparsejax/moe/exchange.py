"""Exchange: experts live on other devices, so tokens travel there or weights say no.

An exchange is ``(dispatch, x, visits, experts, *, axis, ...) -> Exchanged``, called
with one device's tokens and one device's experts inside a ``shard_map`` over all mesh
axes. Ids count over all experts; one past the last marks a slot to skip.
Whatever arrives on a device goes through a dispatcher there. ``ring`` brings all tokens
to all experts; ``all_to_all`` sends each slot's row in a buffer between two devices;
``ragged_all_to_all`` sends only the rows there are. All agree as long as nothing is
dropped, and say what they dropped and why.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.config import near
from sparsejax.moe.capacity import PRIORITIES, Cause, arrivals
from sparsejax.moe.dispatch import Dispatcher, dispatch_of
from sparsejax.moe.experts import GatedExperts
from sparsejax.moe.order import (
    buffers,
    combine,
    inverse,
    owners,
    ranks,
    sort,
    take,
)
from sparsejax.moe.ragged import grants, moved, moved_ids
from sparsejax.moe.routers import Routing
from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "EXCHANGES",
    "Exchange",
    "Exchanged",
    "Visits",
    "all_to_all",
    "apply_experts",
    "exchange",
    "ragged_all_to_all",
    "ring",
    "takes",
]


class Visits(NamedTuple):
    """Where each slot goes, and what the answer weighs."""

    chosen: Int[Array, "n k"]
    weights: Float[Array, "n k"]


class Exchanged(NamedTuple):
    """The mixed answers, and what became of each slot."""

    values: Float[Array, "n d"]
    causes: Int[Array, "n k"]  # of ``Cause``; 0 where nothing was lost


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How tokens travel over a mesh.

    Attributes:
        name: a name of ``EXCHANGES``; without an expert axis nothing travels.
        expert_axis: mesh axis over which experts and tokens are divided.
        tensor_axis: mesh axis over which the experts' hidden width is divided.
        rows: of a buffer, between each pair of devices for all_to_all and on each
            receiving device for ragged_all_to_all; None makes room for everything.
        capacity: rows an expert takes of those that arrive, for all_to_all; None takes
            them all.
        priority: a name of ``PRIORITIES``: which slots a sender serves first.
    """

    name: str = "ring"
    expert_axis: str | None = None
    tensor_axis: str | None = None
    rows: int | None = None
    capacity: int | None = None
    priority: str = "position"

    def __post_init__(self) -> None:
        for field, value, table in (
            ("exchange", self.name, EXCHANGES),
            ("priority", self.priority, PRIORITIES),
        ):
            if value not in table:
                raise ValueError(f"{field}={value!r}: no such name{near(value, table)}")
        for field in ("rows", "capacity"):
            value = getattr(self, field)
            if value is None:
                continue
            if value < 1:
                raise ValueError(f"{field}={value}: must be at least one row")
            if not takes(self.name, field):
                raise ValueError(
                    f"{field}={value}: exchange {self.name!r} has no such limit; drop"
                    " with limited(routing, capacity) instead"
                )


def takes(name: str, setting: str) -> bool:
    """Say whether an exchange has a setting: ``rows``, ``capacity``, ``priority``."""
    return setting in inspect.signature(EXCHANGES[name]).parameters


def ring(
    dispatch: Dispatcher,
    x: Float[Array, "n d"],
    visits: Visits,
    experts: GatedExperts,
    *,
    axis: str,
) -> Exchanged:
    """Gather the tokens of all devices, apply the experts at hand, sum the answers.

    Bytes grow with the devices and not with the choices; nothing is dropped. Sums are
    in float32.
    """
    everyone = (lax.all_gather(a, axis, tiled=True) for a in (x, *visits))
    x, everywhere, weights = everyone
    count = experts.up.shape[0]
    first = lax.axis_index(axis) * count
    here = (everywhere >= first) & (everywhere < first + count)
    y = dispatch(x, jnp.where(here, everywhere - first, count), weights, experts)
    y = lax.psum_scatter(y, axis, tiled=True)
    return Exchanged(y, jnp.zeros_like(visits.chosen))


def all_to_all(
    dispatch: Dispatcher,
    x: Float[Array, "n d"],
    visits: Visits,
    experts: GatedExperts,
    *,
    axis: str,
    rows: int | None = None,
    capacity: int | None = None,
    priority: str = "position",
) -> Exchanged:
    """Send each slot's row in a buffer of ``rows`` between each pair of devices.

    A slot is lost at the sender if the buffer is full, at the receiver if its expert
    has its ``capacity`` rows; senders take turns there, each in its own order.
    """
    chosen, weights = visits
    devices, count = lax.axis_size(axis), experts.up.shape[0]
    rows = chosen.size if rows is None else min(rows, chosen.size)
    target = chosen // count
    rank = arrivals(target, weights, targets=devices, priority=priority)
    slots, cells, sent = buffers(target, rank, targets=devices, capacity=rows)
    swap = partial(
        lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True
    )
    ids = swap(_at(slots, chosen % count, count))
    fits = jnp.ones_like(ids, dtype=bool)
    if capacity is not None:
        fits = _first(ids.reshape(devices, rows), count, capacity)
    y = _answers(
        dispatch, swap(take(x, owners(slots, chosen), cells)), ids, fits, experts
    )
    y = take(swap(y), cells.reshape(-1), slots[None])
    causes = jnp.where(sent, Cause.NONE, Cause.SENDER)
    if capacity is not None:
        kept = swap(fits).at[cells.T].get(mode="fill", fill_value=False)
        causes = jnp.where(sent & ~kept, Cause.RECEIVER, causes)
    causes = jnp.where(target < devices, causes, Cause.NONE).astype(chosen.dtype)
    return Exchanged(combine(y, weights, target == devices), causes)


def ragged_all_to_all(
    dispatch: Dispatcher,
    x: Float[Array, "n d"],
    visits: Visits,
    experts: GatedExperts,
    *,
    axis: str,
    rows: int | None = None,
    priority: str = "position",
) -> Exchanged:
    """Send each slot's row, and no other; nothing is dropped unless ``rows`` are few.

    A device has room for ``rows`` rows; those past them are known to their senders and
    not sent.
    """
    chosen, weights = visits
    devices, count = lax.axis_size(axis), experts.up.shape[0]
    most = devices * chosen.size
    rows = most if rows is None else min(rows, most)
    target = chosen // count
    rank = arrivals(target, weights, targets=devices, priority=priority)
    ids = jnp.arange(devices, dtype=target.dtype)
    wanted = (target[..., None] == ids[None, None]).sum(axis=(0, 1), dtype=ids.dtype)
    sizes = grants(lax.all_gather(wanted, axis), rows)
    mine = sizes[lax.axis_index(axis)]
    to = jnp.minimum(target, devices - 1)
    sent = (target < devices) & (rank < mine[to])
    cells = jnp.where(sent, (jnp.cumsum(mine) - mine)[to] + rank, chosen.size).T
    slots = inverse(cells.reshape(-1), chosen.size)
    arrived = moved_ids(_at(slots, chosen % count, count), sizes, axis, rows, count)
    x = moved(take(x, owners(slots, chosen), cells), sizes, axis, rows)
    y = _answers(dispatch, x, arrived, jnp.ones_like(arrived, dtype=bool), experts)
    y = moved(y, sizes.T, axis, chosen.size)
    y = take(y, cells.reshape(-1), slots[None])
    lost = (target < devices) & ~sent
    causes = jnp.where(lost, Cause.RECEIVER, Cause.NONE).astype(chosen.dtype)
    return Exchanged(combine(y, weights, target == devices), causes)


def _at(
    slots: Int[Array, " m"], values: Int[Array, "n k"], fill: int
) -> Int[Array, " m"]:
    """Look up the value of each slot; ``fill`` where there is no slot."""
    return values.T.reshape(-1).at[slots].get(mode="fill", fill_value=fill)


def _first(ids: Int[Array, "n m"], count: int, capacity: int) -> Bool[Array, " q"]:
    """Say which rows are among their expert's first: of every sender's row by row."""
    rank = ranks(sort(ids, count)).reshape(ids.T.shape)
    return (rank < capacity).T.reshape(-1)


def _answers(
    dispatch: Dispatcher,
    x: Float[Array, "m d"],
    ids: Int[Array, " m"],
    fits: Bool[Array, " m"],
    experts: GatedExperts,
) -> Float[Array, "m d"]:
    """Answer the rows that came, each for one expert, in their own dtype."""
    local = jnp.where(fits, ids, experts.up.shape[0])[:, None]
    return dispatch(x, local, jnp.ones(local.shape), experts).astype(x.dtype)


def exchange(
    dispatch: Dispatcher,
    x: Float[Array, "n d"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    experts: GatedExperts,
    *,
    how: Exchange,
) -> Exchanged:
    """Run a dispatcher on one device's tokens and experts, inside ``shard_map``."""
    axis = how.expert_axis
    total = experts.up.shape[0] * (1 if axis is None else lax.axis_size(axis))
    chosen = jnp.where(weights != 0, chosen, total)
    experts = jax.tree.map(lambda w: w.astype(x.dtype), experts)
    if axis is None:
        y = dispatch(x, chosen, weights, experts)
        found = Exchanged(y, jnp.zeros_like(chosen))
    else:
        names = ("rows", "capacity", "priority")
        settings = {n: getattr(how, n) for n in names if takes(how.name, n)}
        travel = EXCHANGES[how.name]
        visits = Visits(chosen, weights)
        with jax.named_scope("exchange"):  # tells its collectives from others
            found = travel(dispatch, x, visits, experts, axis=axis, **settings)
    y = found.values
    if how.tensor_axis is not None:
        y = lax.psum(y, how.tensor_axis)
    return Exchanged(y.astype(x.dtype), found.causes)


def apply_experts(
    x: Float[Array, "n d"],
    routing: Routing,
    experts: GatedExperts,
    *,
    dispatcher: str = "grouped",
    activation: str = "silu",
    capacity: int | None = None,
    implementation: str | None = None,
    how: Exchange | None = None,
) -> Float[Array, "n d"]:
    """Give each token the weighted sum of the answers of its experts.

    Args:
        x: tokens; over a mesh, those of this device.
        routing: ids count over all experts, weights of 0 are skipped.
        experts: weights; over a mesh, those of this device.
        dispatcher: a name of ``DISPATCHERS``.
        activation: a name of ``ACTIVATIONS``.
        capacity: rows for each expert, for the capacity dispatcher only. To drop under
            any other, and to count the drops, pass the routing through ``limited``.
        implementation: of grouped products, a name of ``grouped.IMPLEMENTATIONS``.
        how: the way over a mesh, inside ``shard_map``; None stays on this device.

    Raises:
        ValueError: for a name that does not exist, a capacity missing or unused, and
            ids, weights or experts of which there are not equally many.
    """
    how = Exchange() if how is None else how
    _check_sizes(x, routing, experts, alone=how.expert_axis is None)
    dispatch = dispatch_of(
        dispatcher,
        activation=activation,
        capacity=capacity,
        implementation=implementation,
    )
    chosen, weights = routing.experts, routing.weights
    return exchange(dispatch, x, chosen, weights, experts, how=how).values


def _check_sizes(
    x: Array, routing: Routing, experts: GatedExperts, *, alone: bool
) -> None:
    shapes = routing.experts.shape, routing.weights.shape
    if shapes[0] != shapes[1] or shapes[0][:1] != x.shape[:1]:
        raise ValueError(
            f"ids of shape {shapes[0]} and weights of shape {shapes[1]} for"
            f" {x.shape[0]} tokens: each token must have a row in both, equally wide"
        )
    known, there = routing.probs.shape[1], experts.up.shape[0]
    if alone and known != there:
        raise ValueError(
            f"a routing over {known} experts, and weights of {there}: must be equally"
            " many; over a mesh, name its axis in how.expert_axis"
        )


EXCHANGES: dict[str, Callable[..., Exchanged]] = {
    "ring": ring,
    "all_to_all": all_to_all,
    "ragged_all_to_all": ragged_all_to_all,
}
