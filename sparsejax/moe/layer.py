"""The mixture-of-experts layer: owns parameters, calls router, balance and dispatch.

Routing and its statistics are computed on global arrays; only moving tokens and
applying experts runs on each device's piece. The balancing bias of a router is state,
not a parameter: the layer reads it and reports ``metrics["load"]``; whoever owns the
step writes ``updated_bias(bias, load, bias.rate)`` after it, outside the gradient.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax import partition
from sparsejax.moe.balance import balance_loss, metrics, z_loss
from sparsejax.moe.config import MoEConfig
from sparsejax.moe.dispatch import (
    capacity_of,
    dispatch_of,
    exchange,
    has_buffers,
    limited,
)
from sparsejax.moe.experts import ACTIVATIONS, GatedExperts
from sparsejax.moe.routers import Routing
from sparsejax.typing import Array, Bool, Float, Int, Output, PRNGKeyArray

__all__ = ["MoE", "RouterBias"]


class RouterBias(nnx.Variable):
    """Bias that moves the choice of experts; its metadata holds the ``rate``."""


class MoE(nnx.Module):
    """A feed-forward layer in which each token visits a few of many experts.

    Source: Shazeer et al. 2017, arXiv:1701.06538, Eq. 1. Departure: gated experts, and
    the router is any of ``ROUTERS``.
    """

    def __init__(
        self, config: MoEConfig, width: int, *, init_scale: float = 1.0, rngs: nnx.Rngs
    ) -> None:
        """Initialise the weights; ``init_scale`` multiplies those that write."""
        self.config = config
        e, f, s = config.experts, config.hidden, config.shared
        init = jax.nn.initializers.lecun_normal(batch_axis=0)
        router = 0.02 * jax.random.normal(rngs.params(), (width, e))
        self.router = nnx.Param(router, axes="d e")
        self.gate = nnx.Param(init(rngs.params(), (e, width, f)), axes="e d f")
        self.up = nnx.Param(init(rngs.params(), (e, width, f)), axes="e d f")
        down = init_scale * init(rngs.params(), (e, f, width))
        self.down = nnx.Param(down, axes="e f d")
        if config.bias_rate is not None:
            self.bias = RouterBias(jnp.zeros(e), axes="e", rate=config.bias_rate)
        if s:
            dense = jax.nn.initializers.lecun_normal()
            self.shared_gate = nnx.Param(dense(rngs.params(), (width, s)), axes="d f")
            self.shared_up = nnx.Param(dense(rngs.params(), (width, s)), axes="d f")
            down = init_scale * dense(rngs.params(), (s, width))
            self.shared_down = nnx.Param(down, axes="f d")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        tokens: Int[Array, "b t"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Mix the experts' answers; the answer to padding is 0.

        Args:
            x: hidden states.
            valid: False for padding, which visits no expert and enters no statistic.
            tokens: input ids, for routers that name them.
            key: random key, for routers that name it.

        Raises:
            ValueError: if the mesh does not divide the experts.
        """
        flat = None if valid is None else valid.reshape(-1)
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        logits = x.astype(jnp.float32) @ self.router[...].astype(jnp.float32)
        logits = logits.reshape(-1, self.config.experts)
        context = {"valid": flat, "key": key, "bias": None}
        context["tokens"] = None if tokens is None else tokens.reshape(-1)
        if self.config.bias_rate is not None:
            context["bias"] = self.bias[...]
        routing = self.config.route(logits, context)
        if flat is not None:
            weights = jnp.where(flat[:, None], routing.weights, 0)
            routing = routing._replace(weights=weights)
        kept = _limited(routing, self.config)
        experts = GatedExperts(self.gate[...], self.up[...], self.down[...])
        y = _mix(x, routing if kept is None else kept, experts, self.config)
        if self.config.shared:
            y = y + self._shared(x)
        losses = _losses(logits, routing, self.config, flat)
        return Output(y, losses, metrics(routing, kept, valid=flat))

    def _shared(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        names = ("shared_gate", "shared_up", "shared_down")
        gate, up, down = (getattr(self, name)[...].astype(x.dtype) for name in names)
        hidden = ACTIVATIONS[self.config.activation](x @ gate) * (x @ up)
        return partition.constrain(hidden, "b t f") @ down


def _losses(
    logits: Float[Array, "n e"],
    routing: Routing,
    config: MoEConfig,
    valid: Bool[Array, " n"] | None,
) -> dict[str, Float[Array, ""]]:
    losses = dict(routing.losses)
    if config.balance_weight:
        losses["balance"] = config.balance_weight * balance_loss(routing, valid=valid)
    if config.z_weight:
        losses["z"] = config.z_weight * z_loss(logits, valid=valid)
    return losses


def _capacity(config: MoEConfig, tokens: int) -> int | None:
    if config.capacity_factor is None:
        return None
    return capacity_of(
        tokens=tokens,
        experts=config.experts,
        per_token=config.per_token,
        factor=config.capacity_factor,
    )


def _limited(routing: Routing, config: MoEConfig) -> Routing | None:
    """Drop past the capacity, counted over all devices; None if nothing may drop."""
    capacity = _capacity(config, routing.experts.shape[0])
    return None if capacity is None else limited(routing, capacity)


def _mix(
    x: Float[Array, "b t d"], routing: Routing, experts: GatedExperts, config: MoEConfig
) -> Float[Array, "b t d"]:
    """Apply the experts, each device to its own piece."""
    expert_axis, tensor_axis = partition.axis("expert"), partition.axis("tensor")
    devices = 1
    if expert_axis is not None:
        devices = jax.sharding.get_abstract_mesh().shape[expert_axis]
    if config.experts % devices:
        raise ValueError(
            f"experts={config.experts}: the mesh axis 'expert' of {devices} devices"
            " must divide them"
        )
    total = _capacity(config, routing.experts.shape[0])

    def local(x: Array, chosen: Array, weights: Array, experts: GatedExperts) -> Array:
        rows, chosen, weights = (
            a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights)
        )
        capacity = None  # of a buffer: what does not fit is already dropped
        if total is not None and has_buffers(config.dispatcher):
            capacity = min(total, rows.shape[0] * devices)
        dispatch = dispatch_of(
            config.dispatcher, activation=config.activation, capacity=capacity
        )
        y = exchange(
            dispatch,
            rows,
            chosen,
            weights,
            experts,
            expert_axis=expert_axis,
            tensor_axis=tensor_axis,
        )
        return y.reshape(x.shape)

    # Not flattened: a device keeps the tokens it has, whatever axis cuts a sequence.
    per_token = [
        a.reshape(*x.shape[:2], -1) for a in (routing.experts, routing.weights)
    ]
    weight_axes = GatedExperts("e d f", "e d f", "e f d")  # pyright: ignore
    return partition.per_shard(
        local, inputs=("b t d", "b t k", "b t k", weight_axes), outputs="b t d"
    )(x, *per_token, experts)
