"""Sources: what a layer owns so that its router can read it, parameters and state.

A router names a source in its signature; the layer builds the variables of those that
are named, and of no others. State is no parameter: the layer reports in its metrics
``evidence/NAME`` what the next value of the variable ``NAME`` needs to know, averaged
over micro-batches like everything else, and whoever owns the step writes
``STATES[NAME].update`` of it afterwards, outside the gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.moe.balance import expert_load, updated_bias
from sparsejax.moe.routers.routing import Routing, valid_mean
from sparsejax.typing import Array, Bool, Float

__all__ = [
    "SOURCES",
    "STATES",
    "RouterBias",
    "RouterState",
    "Source",
    "State",
    "moved_means",
    "moved_penalty",
]

Variables = dict[str, nnx.Variable]
Owned = Callable[[str], Any]


class RouterState(nnx.Variable):
    """What a router remembers from step to step; no gradient reaches it."""


class RouterBias(RouterState):
    """Bias that moves the choice of experts; its metadata holds the ``rate``."""


class Source(NamedTuple):
    """Variables of a layer, and what a router is given of them.

    ``build(config, width, rngs)`` makes the variables; ``read(owned, x, config)`` looks
    them up by name and gives the router's argument, with a row for each token if it is
    about tokens. ``learns`` says whether scores from here have parameters that a
    balancing loss could move.
    """

    build: Callable[[Any, int, nnx.Rngs], Variables]
    read: Callable[[Owned, Array, Any], Any]
    learns: bool = True


def _rows(x: Float[Array, "b t e"]) -> Float[Array, "n e"]:
    return x.reshape(-1, x.shape[-1])


def _unit(x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
    """Divide by the norm, in float32; what is 0 stays 0."""
    x = x.astype(jnp.float32)
    squared = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))


def _linear(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    weight = 0.02 * jax.random.normal(rngs.params(), (width, config.experts))
    found: Variables = {"router": nnx.Param(weight, axes="d e")}
    if config.router_bias:
        found["router_bias"] = nnx.Param(jnp.zeros(config.experts), axes="e")
    return found


def _read_linear(owned: Owned, x: Array, config: Any) -> Array:
    logits = _rows(x.astype(jnp.float32) @ owned("router").astype(jnp.float32))
    if config.router_bias:
        logits = logits + owned("router_bias").astype(jnp.float32)[None]
    return logits


def _noise(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    del rngs  # every expert's noise begins with the same scale
    return {"noise": nnx.Param(jnp.zeros((width, config.experts)), axes="d e")}


def _read_noise(owned: Owned, x: Array, config: Any) -> Array:
    del config
    return _rows(x.astype(jnp.float32) @ owned("noise").astype(jnp.float32))


def _cosine(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    space = config.router_width
    down = width**-0.5 * jax.random.normal(rngs.params(), (width, space))
    centroids = jax.random.normal(rngs.params(), (config.experts, space))
    return {
        "projection": nnx.Param(down, axes="d c"),
        "centroids": nnx.Param(centroids, axes="e c"),
        "sharpness": nnx.Param(jnp.log(jnp.asarray(10.0)), axes=""),
    }


def _read_cosine(owned: Owned, x: Array, config: Any) -> Array:
    del config
    query = _unit(x.astype(jnp.float32) @ owned("projection").astype(jnp.float32))
    return jnp.exp(owned("sharpness")) * _rows(query @ _unit(owned("centroids")).T)


def _means(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    drawn = jax.random.normal(rngs.params(), (config.experts, width))
    return {"means": RouterState(drawn, axes="e d")}


def _read_means(owned: Owned, x: Array, config: Any) -> Array:
    del config
    return _rows(_unit(x) @ _unit(owned("means")).T)


def _gain(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    del width, rngs
    return {"gain": nnx.Param(jnp.ones(config.experts), axes="e")}


def _penalty(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    del config, width, rngs
    return {"penalty": RouterState(jnp.asarray(1e-8), axes="")}


def _bias(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    del width, rngs
    if config.bias_rate is None:
        return {}
    start = jnp.zeros(config.experts)
    return {"bias": RouterBias(start, axes="e", rate=config.bias_rate)}


def _table(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    del width, rngs
    rows = np.load(config.table).astype(np.int32)
    return {"table": RouterState(jnp.asarray(rows), axes="v")}


def _nothing(config: Any, width: int, rngs: nnx.Rngs) -> Variables:
    del config, width, rngs
    return {}


def _read_blank(owned: Owned, x: Array, config: Any) -> Array:
    del owned
    return jnp.zeros((x.shape[0] * x.shape[1], config.experts))


def _as_it_is(name: str) -> Callable[[Owned, Array, Any], Any]:
    def read(owned: Owned, x: Array, config: Any) -> Any:
        del x, config
        return owned(name)

    return read


SOURCES: dict[str, Source] = {
    "logits": Source(_linear, _read_linear),
    "cosines": Source(_cosine, _read_cosine),
    "similarities": Source(_means, _read_means, learns=False),
    "blank": Source(_nothing, _read_blank, learns=False),
    "noise": Source(_noise, _read_noise),
    "gain": Source(_gain, _as_it_is("gain")),
    "penalty": Source(_penalty, _as_it_is("penalty")),
    "bias": Source(_bias, _as_it_is("bias")),
    "table": Source(_table, _as_it_is("table")),
}


class State(NamedTuple):
    """How a variable that is no parameter moves.

    ``evidence(x, routing, valid)`` is one array; ``update(value, evidence, config)``
    takes its mean over micro-batches, one layer or several stacked along a first axis.
    """

    evidence: Callable[[Array, Routing, Array | None], Array]
    update: Callable[[Array, Array, Any], Array]


def _load(
    x: Float[Array, "n d"], routing: Routing, valid: Bool[Array, " n"] | None
) -> Float[Array, " e"]:
    del x
    return expert_load(routing, valid=valid)


def _visit_sums(
    x: Float[Array, "n d"], routing: Routing, valid: Bool[Array, " n"] | None
) -> Float[Array, "e q"]:
    """Sum the tokens that visit each expert; the last column counts them."""
    used = routing.weights != 0
    if valid is not None:
        used &= valid[:, None]
    one_hot = jax.nn.one_hot(routing.experts, routing.probs.shape[1])
    visits = jnp.where(used[..., None], one_hot, 0).sum(axis=1)
    x = jnp.concatenate([x.astype(jnp.float32), jnp.ones((x.shape[0], 1))], axis=1)
    return jax.lax.stop_gradient(visits.T @ x)


def moved_means(
    means: Float[Array, "*l e d"], sums: Float[Array, "*l e q"], rate: float
) -> Float[Array, "*l e d"]:
    """Move each mean by ``rate`` towards the mean of what visited it, if anything did.

    Args:
        sums: of the tokens that visited each expert, and, last, their number.

    Source: Ahrac et al. 2026, arXiv:2605.12476, abstract. Departure: the running
    average is exponential.
    """
    count = sums[..., -1:]
    found = sums[..., :-1] / jnp.maximum(count, 1e-9)
    return jnp.where(count > 0, means + rate * (found - means), means)


def _density(
    x: Float[Array, "n d"], routing: Routing, valid: Bool[Array, " n"] | None
) -> Float[Array, ""]:
    """Give the share of experts that a mean token visits."""
    del x
    used = (routing.weights != 0).astype(jnp.float32)
    visits = valid_mean(used, valid).sum() / routing.probs.shape[1]
    return jax.lax.stop_gradient(visits)


def moved_penalty(
    penalty: Float[Array, "*l"], density: Float[Array, "*l"], target: float, rate: float
) -> Float[Array, "*l"]:
    """Multiply by ``rate`` where more experts are visited than asked for, else divide.

    Args:
        density: share of the experts that a mean token visits.
        target: the share asked for.

    Source: Wang et al. 2024, arXiv:2412.14711, Eq. 8. Departure: it stays between
    1e-12 and 1e6, or a long way to one side would end at 0 or infinity for good.
    """
    return jnp.clip(penalty * rate ** jnp.sign(density - target), 1e-12, 1e6)


STATES: dict[str, State] = {
    "bias": State(
        _load,
        lambda bias, load, config: updated_bias(bias, load, config.bias_rate),
    ),
    "means": State(
        _visit_sums,
        lambda means, sums, config: moved_means(
            means, sums, 0.01 if config.state_rate is None else config.state_rate
        ),
    ),
    "penalty": State(
        _density,
        lambda penalty, density, config: moved_penalty(
            penalty,
            density,
            config.per_token / config.experts,
            1.2 if config.state_rate is None else config.state_rate,
        ),
    ),
}
