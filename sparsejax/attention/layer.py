"""The attention layer: projections, rotation, and a mixer between them.

``Attention(config, width, heads, kv_heads, *, init_scale, rngs)``; ``init_scale``
multiplies the output projection, because the layer adds to a residual stream. With a
``Cache`` the layer reads the keys of earlier calls and returns the cache with its own
added; without one it sees only the tokens it is given. The mixer is the config's: a
pattern's, or that of a method in ``selectors``. What a layer does around its own
projections and mixer, for any kind of keys, is in ``given``, ``remembered`` and
``written``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from sparsejax.attention.attended import Segments
from sparsejax.attention.config import AttentionConfig
from sparsejax.attention.context import Context, Mixed
from sparsejax.attention.key_conv import key_conv
from sparsejax.attention.rope import head_norm, rope
from sparsejax.attention.selectors import METHODS, Patterned, Sizes
from sparsejax.typing import Array, Float, Int, Output

__all__ = [
    "Attention",
    "Cache",
    "empty_cache",
    "given",
    "mixer_of",
    "remembered",
    "written",
]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in front of room for more.

    Heads come first: a product of one query with all keys then moves nothing. Latent
    attention has one head of keys, and values that it makes of them.
    """

    keys: Float[Array, "b g s c"]
    values: Float[Array, "b g s c"] | None
    length: Int[Array, ""]  # how many are filled
    features: dict[str, Array] = {}  # noqa: RUF012  what the mixer keeps, "b s …"
    summaries: dict[str, Array] = {}  # noqa: RUF012  and makes of stretches, "b m …"
    recent: Any = None  # raw keys "b w g c" that a convolution still needs

    @classmethod
    def empty(
        cls, batch: int, capacity: int, kv_heads: int, head_width: int, *, dtype: Any
    ) -> "Cache":
        """Give a cache with room for ``capacity`` tokens.

        A multiple of the layer's ``block_kv`` spares a copy at every step.
        """
        shape = batch, kv_heads, capacity, head_width
        keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return cls(keys, values, jnp.zeros((), "int32"))  # each can be donated

    def extended(
        self, keys: Array, values: Array | None, features: dict[str, Array]
    ) -> "Cache":
        """Add tokens, "b t g c"; the caller sees to it that they fit."""

        def put(axis: int, old: Array, fresh: Array) -> Array:
            fresh = fresh.astype(old.dtype)
            place = jax.lax.dynamic_update_slice_in_dim
            longer = place(old, fresh, self.length, axis=axis)
            return jax.lax.optimization_barrier(longer)  # else each reader's own copy

        tokens = keys.shape[1]
        keys = put(2, self.keys, keys.swapaxes(1, 2))
        if self.values is not None and values is not None:
            values = put(2, self.values, values.swapaxes(1, 2))
        along = functools.partial(put, 1)
        features = jax.tree.map(along, self.features, features)
        length = self.length + tokens
        return self._replace(keys=keys, values=values, length=length, features=features)


class Attention(nnx.Module):
    """Grouped-query attention under a block mask."""

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        if heads % kv_heads:
            raise ValueError(
                f"heads={heads}: must be a multiple of kv_heads={kv_heads}"
            )
        if config.latent is not None:
            raise ValueError("config.latent is given: build a LatentAttention")
        self.config = config
        c = config.widths(width, heads).keys
        init = jax.random.normal
        scale, out = width**-0.5, init_scale * (heads * c) ** -0.5
        self.query = nnx.Param(
            init(rngs.params(), (width, heads, c)) * scale, axes="d h c"
        )
        self.key = nnx.Param(
            init(rngs.params(), (width, kv_heads, c)) * scale, axes="d g c"
        )
        self.value = nnx.Param(
            init(rngs.params(), (width, kv_heads, c)) * scale, axes="d g c"
        )
        self.out = nnx.Param(init(rngs.params(), (heads, c, width)) * out, axes="h c d")
        self._extras(heads, kv_heads, c, width)
        if config.key_conv:
            taps = jnp.zeros((config.key_conv, kv_heads, c))
            self.taps = nnx.Param(taps, axes=f"{config.key_conv} g c")
        self.sinks = (
            nnx.Param(jnp.zeros(heads), axes="h") if config.learned_sinks else None
        )
        self.mixer = mixer_of(config, Sizes(width, heads, kv_heads, c), rngs=rngs)

    def _extras(self, heads: int, kv_heads: int, c: int, width: int) -> None:
        """Make the norms and biases that the config asks for: ones, and zeros."""
        config = self.config
        if config.qk_norm:
            q, k, over = (c,), (c,), ("c", "c")
            if config.qk_norm_over != "head":
                q, k, over = (heads, c), (kv_heads, c), ("h c", "g c")
            self.query_norm = nnx.Param(jnp.ones(q), axes=over[0])
            self.key_norm = nnx.Param(jnp.ones(k), axes=over[1])
        if config.qkv_biases:
            self.query_bias = nnx.Param(jnp.zeros((heads, c)), axes="h c")
            self.key_bias = nnx.Param(jnp.zeros((kv_heads, c)), axes="g c")
            self.value_bias = nnx.Param(jnp.zeros((kv_heads, c)), axes="g c")
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(width), axes="d")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Output, Cache | None]:
        """Mix tokens along the sequence.

        Args:
            positions: what the rotation sees, counted within each document.
            segments: document numbers of packed tokens; 0 is padding.
            cache: tokens of earlier calls; a call that overflows it gives NaN.

        Raises:
            ValueError: for a cache together with segments or with a pattern that reads
                the future, and for a cache that is known to overflow.
        """
        recent = None if cache is None else cache.recent
        q, k, v, recent = self._project(x, positions, segments, recent)
        context = given(self, x, positions, segments)
        if cache is not None:
            cache = cache._replace(recent=recent)
            cache, context = remembered(self.mixer, cache, k, v, context)
            kept = cache.keys, cache.values
            k, v = (a.swapaxes(1, 2).astype(x.dtype) for a in kept if a is not None)
        return written(self, self.mixer(q, k, v, x, context), cache), cache

    def _project(
        self, x: Array, positions: Array, segments: Any, recent: Any
    ) -> tuple[Array, Array, Array, Any]:
        """Queries and keys, normed and rotated, values, and the last raw keys."""
        q, k, v = (
            jnp.einsum("btd,dhc->bthc", x, w[...].astype(x.dtype))
            for w in (self.query, self.key, self.value)
        )
        if self.config.qkv_biases:
            biases = (self.query_bias, self.key_bias, self.value_bias)
            q, k, v = (
                a + bias[...].astype(x.dtype)[None, None]
                for a, bias in zip((q, k, v), biases, strict=True)
            )
        if self.config.key_conv:
            edge = self.config.key_conv - 1
            if recent is None:
                recent = jnp.zeros_like(k, shape=(len(k), edge, *k.shape[2:]))
            line = jnp.concatenate([recent.astype(k.dtype), k], axis=1)
            k = key_conv(k, self.taps[...], before=recent, segments=segments)
            recent = line[:, line.shape[1] - edge :].astype(recent.dtype)
        if self.config.qk_norm:
            epsilon = self.config.norm_epsilon
            q = head_norm(q, self.query_norm[...], epsilon=epsilon)
            k = head_norm(k, self.key_norm[...], epsilon=epsilon)
        turning = {"theta": self.config.rope_theta, "scaling": self.config.rope_scaling}
        q, k = (rope(a, positions, **turning) for a in (q, k))
        return q, k, v, recent


def given(
    layer: Any,
    x: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    segments: Int[Array, "b t"] | None,
) -> Context:
    """Say what holds for a call of a layer with ``config``, ``mixer`` and ``sinks``."""
    return Context(
        config=layer.config,
        positions=positions,
        sinks=None if layer.sinks is None else layer.sinks[...],
        segments=None if segments is None else Segments(segments, segments),
        features=layer.mixer.features(x, positions),
    )


def remembered(
    mixer: Any, cache: Cache, keys: Array, values: Array | None, context: Context
) -> tuple[Cache, Context]:
    """Add tokens, "b t g c", to a cache, and let the mixer read all that it holds.

    Raises:
        ValueError: for segments, a pattern that reads the future, or no room.
    """
    _check_cache(cache, keys.shape[1], context)
    longer = cache.extended(keys, values, context.features)
    longer = _summed_up(mixer, longer, keys.shape[1])
    context = context._replace(
        q_offset=cache.length,
        features=longer.features,
        summaries=longer.summaries,
        cached=True,
    )
    return longer, context


def _summed_up(mixer: Any, cache: Cache, fresh: int) -> Cache:
    """Summarise the stretches that end in the last ``fresh`` tokens of a cache."""
    capacity = cache.keys.shape[2]
    stretch = mixer.stretch(capacity)
    there = stretch.number(capacity)
    if not cache.summaries or not there:
        return cache
    length, stride = stretch
    count = min(there, -(-fresh // stride))
    first = (cache.length - fresh - length) // stride + 1
    first = jnp.clip(first, 0, there - count)  # some may be done again

    def cut(x: Array, axis: int) -> Array:
        size = (count - 1) * stride + length
        return jax.lax.dynamic_slice_in_dim(x, first * stride, size, axis)

    keys = cut(cache.keys, 2).swapaxes(1, 2)
    found = mixer.summaries(keys, {n: cut(x, 1) for n, x in cache.features.items()})
    put = jax.lax.dynamic_update_slice_in_dim
    done = jax.tree.map(
        lambda old, new: put(old, new.astype(old.dtype), first, axis=1),
        cache.summaries,
        found,
    )
    return cache._replace(summaries=done)


def written(layer: Any, mixed: Mixed, cache: Cache | None) -> Output:
    """Project what a mixer returns by the layer's ``out``; NaN if the cache is over."""
    values = mixed.values
    if cache is not None:
        values = jnp.where(cache.length <= cache.keys.shape[2], values, jnp.nan)
    # Not einsum: it sums over c before h, for which XLA would move the weights.
    out = jnp.tensordot(values, layer.out[...].astype(values.dtype), axes=2)
    if layer.config.out_bias:
        out = out + layer.out_bias[...].astype(values.dtype)[None, None]
    return Output(out, mixed.losses, mixed.metrics)


def empty_cache(
    config: AttentionConfig, sizes: Sizes, batch: int, capacity: int, *, dtype: Any
) -> Cache:
    """Give a cache with room for ``capacity`` tokens and what the mixer keeps."""
    heads, c = sizes.kv_heads, sizes.head_width
    if config.latent is not None:
        heads, c = 1, config.latent.kv_rank + config.latent.rotated_width
    cache = Cache.empty(batch, capacity, heads, c, dtype=dtype)
    if config.latent is not None:
        cache = cache._replace(values=None)

    def asides() -> dict[str, dict[str, Array]]:
        mixer = mixer_of(config, sizes, rngs=nnx.Rngs(0))
        x = jnp.zeros((batch, capacity, sizes.width), dtype)
        features = mixer.features(x, jnp.zeros(x.shape[:2], "int32"))
        summaries = mixer.summaries(cache.keys.swapaxes(1, 2), features)
        return {"features": features, "summaries": summaries}

    shapes = jax.eval_shape(asides)
    kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if config.key_conv:
        recent = jnp.zeros((batch, config.key_conv - 1, heads, c), dtype)
        cache = cache._replace(recent=recent)
    return cache._replace(**kept)


def mixer_of(config: AttentionConfig, sizes: Sizes, *, rngs: nnx.Rngs) -> Any:
    """Build the mixer of a config."""
    if config.selector is None:
        return Patterned()
    return METHODS[config.selector].build(config, sizes, rngs=rngs)


def _check_cache(cache: Cache, tokens: int, context: Context) -> None:
    config = context.config
    if context.segments is not None:
        raise ValueError(
            "cache and segments exclude each other; give each document its own cache"
        )
    if not config.is_causal:
        what = config.selector or config.pattern
        raise ValueError(f"{what!r} reads the future, which a cache does not have")
    capacity = cache.keys.shape[2]
    known = 0 if isinstance(cache.length, Tracer) else int(cache.length)
    if known + tokens > capacity:
        raise ValueError(
            f"{known} cached and {tokens} new tokens overflow the cache's capacity of"
            f" {capacity}; make it larger"
        )
