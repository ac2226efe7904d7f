"""Sparse upcycling: a trained dense model becomes one of routed experts.

A conversion is a pure function from a model and another config to a model of it. Every
parameter and every state that both have is taken over; what only the new one has is
drawn.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.config import ConfigError
from sparsejax.moe import MoEConfig
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.transformer import Transformer
from sparsejax.tree import leaves, map_with_path
from sparsejax.typing import Array, Float, PRNGKeyArray

__all__ = ["dropped", "upcycled"]

CHANNELS = {"gate": 3, "up": 3, "down": 2}  # axis of the hidden width, "l e d f"


def upcycled(
    model: Transformer, config: ModelConfig, *, key: PRNGKeyArray, drop: float = 0.0
) -> Transformer:
    """Make every expert a copy of the dense feed-forward in its place.

    With weights that sum to 1 and nothing dropped, the outputs are the dense model's.

    Args:
        model: trained, with a gated feed-forward.
        config: the model's own but for ``ffn``, experts of the same hidden width.
        key: for routers, and for what is drawn again.
        drop: share of each expert's hidden channels that is drawn again, others for
            every expert; 0 keeps all.

    Raises:
        ConfigError: if the configs differ in more than experts for a feed-forward.

    Source: Komatsuzaki et al. 2022, arXiv:2212.05055, Sec. 3. Departure: every layer is
    replaced; the optimiser starts anew.
    """
    _check(model.config, config, drop)
    draw, again = jax.random.split(key)
    sparse = Transformer(config, model.vocabulary, rngs=nnx.Rngs(draw))
    dense = leaves(nnx.state(model, nnx.Param))
    graph, params, rest = nnx.split(sparse, nnx.Param, ...)
    kept = leaves(nnx.split(model, nnx.Param, ...)[2])  # moments and centroids

    def take(path: str, value: Array) -> Array:
        parent, _, name = path.rpartition("/")
        source = f"{parent.removesuffix('moe')}ffn/{name}"
        if not parent.endswith("/moe") or source not in dense:
            return dense.get(path, value)
        copies = jnp.broadcast_to(dense[source][:, None], value.shape)
        # One key for a layer's three weights: they lose the same channels.
        own = jax.random.fold_in(again, sorted(dense).index(f"{parent[:-3]}ffn/up"))
        return dropped(copies, own, share=drop, axis=CHANNELS[name])

    rest = map_with_path(kept.get, rest)
    return nnx.merge(graph, map_with_path(take, params), rest)


def dropped(
    weights: Float[Array, "l e *shape"], key: PRNGKeyArray, *, share: float, axis: int
) -> Float[Array, "l e *shape"]:
    """Draw a share of each expert's channels again, from its own mean and deviation.

    Args:
        weights: "l e d f" or "l e f d".
        share: of the channels along ``axis``; their number is rounded down.

    Source: Nakamura et al. 2025, arXiv:2502.19261, Sec. 3.
    """
    layers, experts, channels = *weights.shape[:2], weights.shape[axis]
    order, noise = jax.random.split(key)
    rank = jnp.argsort(jax.random.uniform(order, (layers, experts, channels)))
    lost = jnp.argsort(rank) < int(share * channels)
    lost = jnp.expand_dims(lost, 5 - axis)
    mean = weights.mean(axis=(2, 3), keepdims=True)
    spread = weights.std(axis=(2, 3), keepdims=True)
    noise = jax.random.fold_in(noise, axis)
    drawn = mean + spread * jax.random.normal(noise, weights.shape, weights.dtype)
    return jnp.where(lost, drawn, weights)


def _check(dense: ModelConfig, sparse: ModelConfig, drop: float) -> None:
    """Refuse what would not begin as the dense model."""
    old, new = dense.ffn, sparse.ffn
    if not isinstance(old, GatedConfig) or not isinstance(new, MoEConfig):
        raise ConfigError(
            f"model.ffn.kind={old.kind!r} to {new.kind!r}: upcycling makes 'moe' of"
            " 'gated'"
        )
    if new.hidden != old.hidden or not new.gated or new.activation != old.activation:
        raise ConfigError(
            f"model.ffn: experts of hidden={new.hidden}, activation={new.activation!r}"
            f" must be like the feed-forward, hidden={old.hidden},"
            f" activation={old.activation!r}, with a gate"
        )
    for name, plain in (("shared", 0), ("hops", 1)):
        if getattr(new, name) != plain:
            raise ConfigError(
                f"model.ffn.{name}={getattr(new, name)}: must be {plain}; more is added"
                " to what the copies of the feed-forward give"
            )
    for field in dataclasses.fields(ModelConfig):
        own, other = (getattr(config, field.name) for config in (dense, sparse))
        if field.name != "ffn" and other != own:
            raise ConfigError(
                f"model.{field.name}={other!r}: must be the dense model's, {own!r};"
                " only ffn may differ"
            )
    if not 0 <= drop <= 1:
        raise ConfigError(f"drop={drop}: must be between 0 and 1")
