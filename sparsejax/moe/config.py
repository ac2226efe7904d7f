"""What a mixture-of-experts layer is: sizes, router, dispatcher, balance."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sparsejax.config import FieldError, choose, near, require
from sparsejax.moe.capacity import PRIORITIES, ROUNDINGS
from sparsejax.moe.dispatch import DISPATCHERS, has_buffers
from sparsejax.moe.exchange import EXCHANGES, takes
from sparsejax.moe.experts import ACTIVATIONS
from sparsejax.moe.routers import ROUTERS, Routing, accepts, settings
from sparsejax.typing import Array, Float

__all__ = ["MoEConfig"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A feed-forward layer of routed experts.

    Attributes:
        experts: how many there are.
        per_token: how many a token visits.
        hidden: hidden width of each expert.
        router: a name of ``ROUTERS``.
        router_arguments: the router's own settings.
        dispatcher: a name of ``DISPATCHERS``.
        capacity_factor: rows an expert takes, over the balanced load; later visits are
            dropped. None drops nothing.
        capacity_rounding: a name of ``ROUNDINGS``: how that becomes an integer.
        capacity_priority: a name of ``PRIORITIES``: which visits come first.
        exchange: a name of ``EXCHANGES``: how tokens reach experts of other devices,
            if the mesh has an expert axis.
        exchange_factor: rows of an exchange's buffers, over the balanced load; what
            does not fit is dropped. None makes room for everything.
        activation: a name of ``ACTIVATIONS``.
        balance_weight: weight of the balancing loss.
        z_weight: weight of the z-loss.
        shared: hidden width of the expert that every token visits; 0 for none.
        bias_rate: step of the balancing bias; None for no bias, 0 to freeze it.
    """

    kind: Literal["moe"] = "moe"
    experts: int
    per_token: int
    hidden: int
    router: str = "softmax_top_k"
    router_arguments: dict[str, bool | int | float] = field(default_factory=dict)
    dispatcher: str = "grouped"
    capacity_factor: float | None = None
    capacity_rounding: str = "up"
    capacity_priority: str = "position"
    exchange: str = "ring"
    exchange_factor: float | None = None
    activation: str = "silu"
    balance_weight: float = 0.01
    z_weight: float = 0.001
    shared: int = 0
    bias_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("experts", "per_token", "hidden"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("balance_weight", "z_weight", "shared"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(
            self.per_token <= self.experts,
            "per_token",
            self.per_token,
            f"at most experts={self.experts}",
        )
        choose("router", self.router, ROUTERS)
        choose("dispatcher", self.dispatcher, DISPATCHERS)
        choose("activation", self.activation, ACTIVATIONS)
        choose("capacity_rounding", self.capacity_rounding, ROUNDINGS)
        choose("capacity_priority", self.capacity_priority, PRIORITIES)
        choose("exchange", self.exchange, EXCHANGES)
        self._check_capacity()
        self._check_exchange()
        self._check_router()
        rate = self.bias_rate
        require(rate is None or rate >= 0, "bias_rate", rate, "at least 0, or none")

    def _check_capacity(self) -> None:
        factor = self.capacity_factor
        require(
            factor is None or factor > 0,
            "capacity_factor",
            factor,
            "a capacity below one row; must be positive, or none to drop nothing",
        )
        require(
            factor is not None or not has_buffers(self.dispatcher),
            "capacity_factor",
            factor,
            f"dispatcher={self.dispatcher!r} needs one; 1.25 is usual",
        )

    def _check_exchange(self) -> None:
        factor = self.exchange_factor
        require(
            factor is None or factor > 0,
            "exchange_factor",
            factor,
            "must be positive, or none to make room for everything",
        )
        require(
            factor is None or takes(self.exchange, "rows"),
            "exchange_factor",
            factor,
            f"exchange={self.exchange!r} has no buffers; leave it none",
        )

    def _check_router(self) -> None:
        """Route nothing through the router: it knows best what it cannot do."""
        known = settings(ROUTERS[self.router])
        for name, value in self.router_arguments.items():
            path = f"router_arguments.{name}"
            rule = f"{self.router} has no such setting{near(name, known)}"
            require(name in known, path, value, rule)
            kind = type(known[name])
            fits = type(value) is kind or (kind is float and type(value) is int)
            require(fits, path, value, f"expected {kind.__name__}")

        def shapes(logits: Array) -> Routing:
            context = {
                "bias": jnp.zeros(self.experts),
                "tokens": jnp.zeros(1, jnp.int32),
                "valid": jnp.ones(1, bool),
                "key": jax.random.key(0),
            }
            return self.route(logits, context)

        # Only shapes: processes have to meet before any of them touches a device.
        try:
            jax.eval_shape(shapes, jax.ShapeDtypeStruct((1, self.experts), "float32"))
        except ValueError as error:
            raise FieldError(f"router={self.router!r}: {error}") from None

    def route(self, logits: Float[Array, "n e"], context: dict[str, Any]) -> Routing:
        """Call the router with its settings and what it names of the context."""
        router = ROUTERS[self.router]
        given = {name: context[name] for name in accepts(router) if name in context}
        return router(logits, k=self.per_token, **given, **self.router_arguments)
