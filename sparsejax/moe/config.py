"""What a mixture-of-experts layer is: sizes, router, dispatcher, balance."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sparsejax.config import FieldError, choose, near, require
from sparsejax.moe.capacity import PRIORITIES, ROUNDINGS
from sparsejax.moe.dispatch import DISPATCHERS, has_buffers, has_groups
from sparsejax.moe.exchange import EXCHANGES, takes
from sparsejax.moe.experts import ACTIVATIONS, HIDDEN
from sparsejax.moe.grouped import IMPLEMENTATIONS
from sparsejax.moe.routers import (
    CONTEXT,
    LEAKS,
    MOST,
    ROUTERS,
    Routing,
    accepts,
    settings,
)
from sparsejax.moe.sources import SOURCES
from sparsejax.moe.tables import read_table
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
        router_bias: whether the router's linear map has one, learned like its weight.
        router_width: width of the space in which cosines are taken.
        table: file with the expert of each id, for routers that look it up.
        dispatcher: a name of ``DISPATCHERS``.
        implementation: of grouped products, a name of ``grouped.IMPLEMENTATIONS``; None
            takes the platform's own.
        capacity_factor: rows an expert takes, over the balanced load; later visits are
            dropped. None drops nothing.
        capacity_rounding: a name of ``ROUNDINGS``: how that becomes an integer.
        capacity_priority: a name of ``PRIORITIES``: which visits come first.
        exchange: a name of ``EXCHANGES``: how tokens reach experts of other devices,
            if the mesh has an expert axis.
        exchange_factor: rows of an exchange's buffers, over the balanced load; what
            does not fit is dropped. None makes room for everything.
        activation: a name of ``HIDDEN``.
        gated: whether experts have a gate; without one, ``hidden`` is activated.
        biases: whether experts have them.
        balance_weight: weight of the balancing loss.
        z_weight: weight of the z-loss.
        shared: hidden width of the expert that every token visits; 0 for none.
        bias_rate: step of the balancing bias; None for no bias, 0 to freeze it.
        state_rate: step of a router's other state, means or a penalty; None for its
            usual one.
        hops: how often a token, its answer added, asks again.
        halt_below: a token asks no more after an answer whose norm is below this share
            of the token's; 0 never halts.
    """

    kind: Literal["moe"] = "moe"
    experts: int
    per_token: int
    hidden: int
    router: str = "softmax_top_k"
    router_arguments: dict[str, bool | int | float] = field(default_factory=dict)
    router_bias: bool = False
    router_width: int = 64
    table: str | None = None
    dispatcher: str = "grouped"
    implementation: str | None = None
    capacity_factor: float | None = None
    capacity_rounding: str = "up"
    capacity_priority: str = "position"
    exchange: str = "ring"
    exchange_factor: float | None = None
    activation: str = "silu"
    gated: bool = True
    biases: bool = False
    balance_weight: float = 0.01
    z_weight: float = 0.001
    shared: int = 0
    bias_rate: float | None = None
    state_rate: float | None = None
    hops: int = 1
    halt_below: float = 0.0

    def __post_init__(self) -> None:
        for name in ("experts", "per_token", "hidden", "router_width", "hops"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("balance_weight", "z_weight", "shared", "halt_below"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(
            self.per_token <= self.experts,
            "per_token",
            self.per_token,
            f"at most experts={self.experts}",
        )
        choose("router", self.router, ROUTERS)
        choose("dispatcher", self.dispatcher, DISPATCHERS)
        if self.implementation is not None:
            choose("implementation", self.implementation, IMPLEMENTATIONS)
            rule = (
                f"dispatcher={self.dispatcher!r} has no grouped products; leave it none"
            )
            require(
                has_groups(self.dispatcher),
                "implementation",
                self.implementation,
                rule,
            )
        choose("activation", self.activation, HIDDEN)
        require(
            self.gated or self.activation in ACTIVATIONS,
            "activation",
            self.activation,
            "multiplies by a gate; set gated=True, or take another",
        )
        choose("capacity_rounding", self.capacity_rounding, ROUNDINGS)
        choose("capacity_priority", self.capacity_priority, PRIORITIES)
        choose("exchange", self.exchange, EXCHANGES)
        self._check_capacity()
        self._check_exchange()
        self._check_router()
        self._check_state()

    def _check_capacity(self) -> None:
        factor = self.capacity_factor
        require(
            factor is None or 0 < factor < math.inf,
            "capacity_factor",
            factor,
            "a capacity below one row, or without end; must be positive and finite, or"
            " none to drop nothing",
        )
        require(
            factor is not None or not has_buffers(self.dispatcher),
            "capacity_factor",
            factor,
            f"dispatcher={self.dispatcher!r} needs one; 1.25 is usual",
        )
        self._without_effect("capacity_rounding", factor is None, "capacity_factor")
        self._without_effect(
            "capacity_priority",
            factor is None and self.exchange_factor is None,
            "capacity_factor or exchange_factor",
        )

    def _without_effect(self, name: str, idle: bool, partner: str) -> None:
        """Refuse another value than the default where nothing reads it."""
        value, default = getattr(self, name), getattr(MoEConfig, name)
        require(
            value == default or not idle,
            name,
            value,
            f"has no effect without {partner}; give that, or leave it {default!r}",
        )

    def _check_exchange(self) -> None:
        factor = self.exchange_factor
        require(
            factor is None or 0 < factor < math.inf,
            "exchange_factor",
            factor,
            "must be positive and finite, or none to make room for everything",
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

        try:
            self._routed()
        except ValueError as error:
            raise FieldError(f"router={self.router!r}: {error}") from None

    def _check_state(self) -> None:
        needs = accepts(ROUTERS[self.router])
        for name in ("bias_rate", "state_rate"):
            rate = getattr(self, name)
            require(rate is None or rate >= 0, name, rate, "at least 0, or none")
        require(
            self.bias_rate is None or "bias" in needs,
            "bias_rate",
            self.bias_rate,
            f"router={self.router!r} reads no bias; leave it none",
        )
        stateless = {"similarities", "penalty"}.isdisjoint(self.sources)
        partner = "a router that has means or a penalty"
        self._without_effect("state_rate", stateless, partner)
        plain = "cosines" not in self.sources
        self._without_effect("router_width", plain, "a router that takes cosines")
        require(
            not self.router_bias or self.score_source == "logits",
            "router_bias",
            self.router_bias,
            f"router={self.router!r} has no linear map; leave it false",
        )
        require(
            ("table" in needs) == (self.table is not None),
            "table",
            self.table,
            f"router={self.router!r} looks nothing up; leave it none"
            if self.table
            else f"router={self.router!r} needs the file of one; write it with"
            " python -m sparsejax.convert table",
        )
        if self.table is not None:
            read_table(self.table, self.experts)
        require(
            self.hops > 1 or not self.halt_below,
            "halt_below",
            self.halt_below,
            "a single hop cannot halt; give hops, or leave it 0",
        )

    @property
    def score_source(self) -> str:
        """The name in ``SOURCES`` that the router's scores come from."""
        return next(iter(inspect.signature(ROUTERS[self.router]).parameters))

    @property
    def sources(self) -> list[str]:
        """What the router reads of the layer: names in ``SOURCES``, scores first."""
        first, needs = self.score_source, accepts(ROUTERS[self.router])
        return [first, *sorted(needs & SOURCES.keys() - {first})]

    @property
    def slots(self) -> int:
        """How many experts a token may visit: some routers leave the number open."""
        return self._routed().experts.shape[1]

    def most_visits(self, *, tokens: int, batch: int) -> int | None:
        """Give what no expert gets more visits than; None if only the tokens limit it.

        Args:
            tokens: of the whole batch.
            batch: sequences that they are of.
        """
        if self.router not in MOST:
            return None
        return MOST[self.router](tokens, batch, self.experts, self.per_token)

    def _routed(self) -> Routing:
        """Give the shapes of one token's routing."""

        def shapes(scores: Array) -> Routing:
            one = jnp.zeros(1, jnp.int32)
            context = dict.fromkeys(("tokens", "previous", "positions", "table"), one)
            context |= {"valid": jnp.ones(1, bool), "batch": 1, "noise": scores}
            context |= {"penalty": jnp.zeros(()), "key": jax.random.key(0)}
            context |= dict.fromkeys(("bias", "gain"), jnp.zeros(self.experts))
            return self.route(scores, context)

        # Only shapes: processes have to meet before any of them touches a device.
        scores = jax.ShapeDtypeStruct((1, self.experts), "float32")
        return jax.eval_shape(shapes, scores)

    @property
    def leak(self) -> str | None:
        """The router to use in this one's place where no later token may be read."""
        return LEAKS.get(self.router)

    def check_vocabulary(self, ids: int) -> None:
        """Raise unless a table, if there is one, has an expert for each id."""
        if self.table is None:
            return
        rows = len(read_table(self.table, self.experts))
        require(rows >= ids, "table", self.table, f"has {rows} ids; must have {ids}")

    def route(self, scores: Float[Array, "n e"], context: dict[str, Any]) -> Routing:
        """Call the router with its settings and what it names of the context."""
        router = ROUTERS[self.router]
        names = accepts(router) & {*CONTEXT, *SOURCES} - {self.score_source}
        given = {name: context[name] for name in names if name in context}
        return router(scores, k=self.per_token, **given, **self.router_arguments)
