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
from sparsejax.moe.capacity import drop_shares
from sparsejax.moe.config import MoEConfig
from sparsejax.moe.experts import ACTIVATIONS, GatedExperts
from sparsejax.moe.mixture import mixed
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
        experts = GatedExperts(self.gate[...], self.up[...], self.down[...])
        y, kept, causes = mixed(x, routing, experts, self.config)
        if self.config.shared:
            y = y + self._shared(x)
        losses = _losses(logits, routing, self.config, flat)
        measured = metrics(routing, kept, valid=flat)
        if kept is not None:
            measured |= drop_shares(routing, causes, valid=flat)
        return Output(y, losses, measured)

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
