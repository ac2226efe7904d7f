"""From a routing to mixed answers, over whatever mesh is ambient.

Limits are integers by the time anything travels. The capacity of an expert counts the
tokens of the whole batch, in their global order, so that a mesh changes nothing; only
``all_to_all`` over an expert axis counts those that arrive at the expert's device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import partition
from sparsejax.moe.capacity import Cause, capacity_of, limited, rows_of
from sparsejax.moe.config import MoEConfig
from sparsejax.moe.dispatch import dispatch_of, has_buffers
from sparsejax.moe.exchange import Exchange, Exchanged, exchange, takes
from sparsejax.moe.experts import GatedExperts, axes_of_experts, with_one_bias
from sparsejax.moe.routers import Routing
from sparsejax.typing import Array, Float, Int

__all__ = ["Mixed", "buffer_rows", "mixed"]


class Mixed(NamedTuple):
    """The answers, and what of the routing took place."""

    values: Float[Array, "b t d"]
    kept: Routing | None  # None if nothing may drop
    causes: Int[Array, "n k"]  # of ``Cause``


class _Plan(NamedTuple):
    """Static limits of one device's piece, and the way it goes."""

    how: Exchange
    capacity: int | None  # rows of an expert's buffer, for dispatchers that have one
    most: int | None  # visits that no expert gets more of, where that is known


def mixed(
    x: Float[Array, "b t d"], routing: Routing, experts: GatedExperts, config: MoEConfig
) -> Mixed:
    """Apply the experts, each device to its own piece.

    Raises:
        ValueError: if the mesh does not divide the experts.
    """
    devices = _devices(config)
    weights = routing.weights
    here = devices > 1 and takes(config.exchange, "capacity")
    total = None if here else _capacity(config, weights.shape[0])
    if total is not None:
        priority = config.capacity_priority
        weights = limited(routing, total, priority=priority).weights

    most = config.most_visits(tokens=weights.shape[0], batch=x.shape[0])

    def local(x: Array, chosen: Array, weights: Array, experts: GatedExperts):
        rows, chosen, weights = (
            a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights)
        )
        plan = _plan(config, rows.shape[0], devices=devices, total=total, most=most)
        dispatch = dispatch_of(
            config.dispatcher,
            activation=config.activation,
            capacity=plan.capacity,
            implementation=config.implementation,
            most=plan.most,
        )
        experts = with_one_bias(experts, plan.how.tensor_axis)
        y, causes = exchange(dispatch, rows, chosen, weights, experts, how=plan.how)
        return Exchanged(y.reshape(x.shape), causes.reshape(*x.shape[:2], -1))

    # Not flattened: a device keeps the tokens it has, whatever axis cuts a sequence.
    per_token = [a.reshape(*x.shape[:2], -1) for a in (routing.experts, weights)]
    y, causes = partition.per_shard(
        local,
        inputs=("b t d", "b t k", "b t k", axes_of_experts(experts)),
        outputs=Exchanged("b t d", "b t k"),  # pyright: ignore
    )(x, *per_token, experts)
    causes = causes.reshape(weights.shape)
    limited_out = (routing.weights != 0) & (weights == 0)
    causes = jnp.where(limited_out, Cause.CAPACITY, causes).astype(jnp.int32)
    if config.capacity_factor is None and config.exchange_factor is None:
        return Mixed(y, None, causes)
    left = jnp.where(causes == Cause.NONE, routing.weights, 0)
    return Mixed(y, routing._replace(weights=left), causes)


def _devices(config: MoEConfig) -> int:
    """Count the devices that share the experts; they must divide them."""
    axis = partition.axis("expert")
    if axis is None:
        return 1
    devices = jax.sharding.get_abstract_mesh().shape[axis]
    if config.experts % devices:
        raise ValueError(
            f"experts={config.experts}: the mesh axis 'expert' of {devices} devices"
            " must divide them; change mesh.expert or the number of experts"
        )
    return devices


def _capacity(config: MoEConfig, tokens: int) -> int | None:
    if config.capacity_factor is None:
        return None
    return capacity_of(
        tokens=tokens,
        experts=config.experts,
        per_token=config.per_token,
        factor=config.capacity_factor,
        rounding=config.capacity_rounding,
    )


def buffer_rows(config: MoEConfig, *, tokens: int, devices: int) -> int | None:
    """Give the rows of an exchange's buffers; None if they have room for everything.

    ``all_to_all`` has a buffer for each pair of devices, the ragged one for each
    receiver.
    """
    if config.exchange_factor is None or devices == 1:
        return None
    pairs = takes(config.exchange, "capacity")
    slots = tokens * config.per_token * (1 if pairs else devices)
    return rows_of(slots=slots, targets=devices, factor=config.exchange_factor)


def _plan(
    config: MoEConfig, tokens: int, *, devices: int, total: int | None, most: int | None
) -> _Plan:
    """Turn factors into rows, for a device with so many tokens."""
    arriving = tokens * devices
    own = _capacity(config, arriving) if total is None else None
    how = Exchange(
        name=config.exchange,
        expert_axis=partition.axis("expert"),
        tensor_axis=partition.axis("tensor"),
        rows=buffer_rows(config, tokens=tokens, devices=devices),
        capacity=own if devices > 1 else None,
        priority=config.capacity_priority,
    )
    # What does not fit in a buffer of so many rows has been dropped before.
    limit = own if total is None else min(total, arriving)
    limits = [x for x in (limit, most) if x is not None]
    rows = limit if has_buffers(config.dispatcher) else None
    return _Plan(how, rows, min(limits, default=None))
