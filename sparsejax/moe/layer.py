"""The mixture-of-experts layer: owns parameters, calls router, balance and dispatch.

Routing and its statistics are computed on global arrays; only moving tokens and
applying experts runs on each device's piece. What the router reads of the layer is
built from ``SOURCES``, as its signature names it. Its state, a balancing bias say, is
not a parameter: the layer reads it and reports ``metrics["evidence/bias"]``; whoever
owns the step writes ``STATES["bias"].update`` of it after the step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax import partition
from sparsejax.moe.balance import balance_loss, metrics, z_loss
from sparsejax.moe.capacity import drop_shares
from sparsejax.moe.config import MoEConfig
from sparsejax.moe.experts import HIDDEN, GatedExperts
from sparsejax.moe.mixture import Mixed, mixed
from sparsejax.moe.routers import Routing
from sparsejax.moe.sources import SOURCES, STATES
from sparsejax.typing import Array, Bool, Float, Int, Output, PRNGKeyArray

__all__ = ["MoE", "asks_again"]


class _Asked(NamedTuple):
    """What a round of choosing experts is about, and what was chosen."""

    rows: Float[Array, "n d"]
    going: Bool[Array, " n"] | None  # False for tokens that do not ask
    scores: Float[Array, "n e"]
    routing: Routing


class _Visit(NamedTuple):
    """One round of choosing experts and asking them."""

    asked: _Asked
    mixed: Mixed


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
        for source in config.sources:
            owned = SOURCES[source].build(config, width, rngs)
            for name, variable in owned.items():
                setattr(self, name, variable)
        if config.gated:
            self.gate = nnx.Param(init(rngs.params(), (e, width, f)), axes="e d f")
        self.up = nnx.Param(init(rngs.params(), (e, width, f)), axes="e d f")
        down = init_scale * init(rngs.params(), (e, f, width))
        self.down = nnx.Param(down, axes="e f d")
        if config.biases:
            for name, axes, wide in _biases(config, width):
                setattr(self, name, nnx.Param(jnp.zeros((e, wide)), axes=axes))
        if s:
            dense = jax.nn.initializers.lecun_normal()
            shape = (width, s)
            if config.gated:
                self.shared_gate = nnx.Param(dense(rngs.params(), shape), axes="d f")
            self.shared_up = nnx.Param(dense(rngs.params(), shape), axes="d f")
            down = init_scale * dense(rngs.params(), (s, width))
            self.shared_down = nnx.Param(down, axes="f d")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        tokens: Int[Array, "b t"] | None = None,
        previous: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Mix the experts' answers; the answer to padding is 0.

        Args:
            x: hidden states.
            valid: False for padding, which visits no expert and enters no statistic.
            tokens: input ids, for routers that name them.
            previous: the input ids before them, likewise.
            positions: of the tokens in their documents, likewise.
            key: random key in training, None otherwise.

        Raises:
            ValueError: if the mesh does not divide the experts, or the router misses
                what it reads.
        """
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        given = {"tokens": tokens, "previous": previous, "positions": positions}
        given["valid"] = valid
        context: dict[str, Any] = {
            name: None if value is None else value.reshape(-1)
            for name, value in given.items()
        }
        context |= {"batch": x.shape[0], "key": key}
        visits = self._visits(x, context)
        y = sum((visit.mixed.values for visit in visits[1:]), visits[0].mixed.values)
        if self.config.shared:
            y = y + self._shared(x)
        return Output(y, *self._asides(visits, context["valid"]))

    def _visits(
        self, x: Float[Array, "b t d"], context: dict[str, Any]
    ) -> list[_Visit]:
        """Ask experts, add their answers to the question, and ask again."""
        found: list[_Visit] = []
        going, key = context["valid"], context["key"]
        if going is None and self.config.hops > 1:
            going = jnp.ones(x.shape[0] * x.shape[1], bool)
        for hop in range(self.config.hops):
            if found:
                answer = found[-1].mixed.values
                going = going & asks_again(x, answer, self.config.halt_below)  # pyright: ignore
                x = x + answer
                key = None if key is None else jax.random.fold_in(key, hop)
            asking = {"valid": going, "key": key}
            scores, routing = self._route(x, context | asking)
            if going is not None:
                weights = jnp.where(going[:, None], routing.weights, 0)
                routing = routing._replace(weights=weights)
            answers = mixed(x, routing, self._experts(), self.config)
            rows = x.reshape(-1, x.shape[-1])
            found.append(_Visit(_Asked(rows, going, scores, routing), answers))
        return found

    def _route(
        self, x: Float[Array, "b t d"], context: dict[str, Any]
    ) -> tuple[Float[Array, "n e"], Routing]:
        """Read the sources, and call the router with them."""
        given = {
            name: SOURCES[name].read(self._owned, x, self.config)
            for name in self.config.sources
        }
        scores = given[self.config.score_source]
        return scores, self.config.route(scores, context | given)

    def _owned(self, name: str) -> Any:  # None for what is not built
        return getattr(self, name)[...] if hasattr(self, name) else None

    def _experts(self) -> GatedExperts:
        return GatedExperts(*map(self._owned, GatedExperts._fields))

    def _shared(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        gate = self._owned("shared_gate")
        gate = None if gate is None else x @ gate.astype(x.dtype)
        up = x @ self.shared_up[...].astype(x.dtype)
        hidden = HIDDEN[self.config.activation](gate, up)
        down = self.shared_down[...].astype(x.dtype)
        return partition.constrain(hidden, "b t f") @ down

    def _asides(
        self, visits: list[_Visit], valid: Bool[Array, " n"] | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Give the losses and metrics of all rounds together."""
        routing, kept, causes = _joined(visits)
        rows, going, scores, each = _in_turn([visit.asked for visit in visits])
        losses = dict(routing.losses)
        learns, config = SOURCES[self.config.score_source].learns, self.config
        if config.balance_weight and learns:
            balance = balance_loss(each, valid=going)
            losses["balance"] = config.balance_weight * balance
        if config.z_weight and learns:
            losses["z"] = config.z_weight * z_loss(scores, valid=going)
        measured = metrics(routing, kept, valid=valid)
        z = z_loss(scores, valid=going)
        measured["router_z"] = jax.lax.stop_gradient(z)
        if kept is not None:
            measured |= drop_shares(routing, causes, valid=valid)
        measured["evidence/scores"] = jax.lax.stop_gradient(scores)
        measured["evidence/experts"] = routing.experts
        measured["evidence/weights"] = jax.lax.stop_gradient(routing.weights)
        for name, state in STATES.items():
            if hasattr(self, name):
                measured[f"evidence/{name}"] = state.evidence(rows, each, going)
        return losses, measured


def _biases(config: MoEConfig, width: int) -> list[tuple[str, str, int]]:
    """Name the experts' biases, with their letters and sizes."""
    found = [("up_bias", "e f", config.hidden), ("down_bias", "e d", width)]
    return [("gate_bias", "e f", config.hidden), *found] if config.gated else found


def asks_again(
    x: Float[Array, "b t d"], answer: Float[Array, "b t d"], halt_below: float
) -> Bool[Array, " n"]:
    """Say which tokens hop on: their answer is not short beside the question.

    Args:
        halt_below: the share of the question's norm that is short; 0 never halts.

    Source: Ternovtsii & Bilak 2026, arXiv:2604.14419, abstract. Departure: what the
    abstract leaves open is ours: experts read question and answer, added, too.
    """
    asked, got = (
        jnp.linalg.norm(a.astype(jnp.float32), axis=-1).reshape(-1) for a in (x, answer)
    )
    return jax.lax.stop_gradient(got >= halt_below * asked)


def _in_turn(rounds: list[_Asked]) -> _Asked:
    """See a token that asks again as one more token."""
    if len(rounds) == 1:
        return rounds[0]
    rounds = [r._replace(routing=r.routing._replace(losses={})) for r in rounds]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *rounds)


def _joined(
    visits: list[_Visit],
) -> tuple[Routing, Routing | None, Int[Array, "n k"]]:
    """See all rounds as one routing, what is left of it, and why the rest is not."""
    routings = [visit.asked.routing for visit in visits]
    if len(visits) == 1:
        return routings[0], visits[0].mixed.kept, visits[0].mixed.causes

    def join(routings: list[Routing]) -> Routing:
        chosen = jnp.concatenate([r.experts for r in routings], axis=1)
        weights = jnp.concatenate([r.weights for r in routings], axis=1)
        probs = jnp.stack([r.probs for r in routings]).mean(axis=0)
        losses = jax.tree.map(lambda *x: sum(x) / len(x), *(r.losses for r in routings))
        return Routing(chosen, weights, probs, losses)

    kept = [visit.mixed.kept for visit in visits]
    causes = jnp.concatenate([visit.mixed.causes for visit in visits], axis=1)
    whole = [k for k in kept if k is not None]
    return join(routings), join(whole) if whole else None, causes
