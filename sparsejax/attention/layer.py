"""The attention layer: projections, rotation, and a block-sparse softmax between them.

``Attention(config, width, heads, kv_heads, *, init_scale, rngs)``; ``init_scale``
multiplies the output projection, because the layer adds to a residual stream. With a
``Cache`` the layer reads the keys of earlier calls and returns the cache with its own
added; without one it sees only the tokens it is given.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from sparsejax.attention.attended import Segments
from sparsejax.attention.config import AttentionConfig
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.operation import block_sparse_attention
from sparsejax.attention.rope import rope
from sparsejax.partition import axis, per_shard
from sparsejax.typing import Array, Float, Int, Output

__all__ = ["Attention", "Cache"]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in front of room for more."""

    keys: Float[Array, "b s g c"]
    values: Float[Array, "b s g c"]
    length: Int[Array, ""]  # how many are filled

    @classmethod
    def empty(
        cls, batch: int, capacity: int, kv_heads: int, head_width: int, *, dtype: Any
    ) -> "Cache":
        """Give a cache with room for ``capacity`` tokens.

        A multiple of the layer's ``block_kv`` spares a copy at every step.
        """
        zeros = jnp.zeros((batch, capacity, kv_heads, head_width), dtype)
        return cls(zeros, zeros, jnp.zeros((), "int32"))

    def extended(self, keys: Array, values: Array) -> "Cache":
        """Add tokens; the caller sees to it that they fit."""
        put = jax.lax.dynamic_update_slice_in_dim
        return Cache(
            put(self.keys, keys.astype(self.keys.dtype), self.length, axis=1),
            put(self.values, values.astype(self.values.dtype), self.length, axis=1),
            self.length + keys.shape[1],
        )


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
        self.config = config
        c = config.head_width or width // heads
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
        if config.qk_norm:
            self.query_norm = nnx.Param(jnp.ones(c), axes="c")
            self.key_norm = nnx.Param(jnp.ones(c), axes="c")
        self.sinks = (
            nnx.Param(jnp.zeros(heads), axes="h") if config.learned_sinks else None
        )

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
        q, k, v = self._project(x, positions)
        sinks = None if self.sinks is None else self.sinks[...]
        if cache is None:
            pair = None if segments is None else Segments(segments, segments)
            mixed = attend(q, k, v, self.config, segments=pair, sinks=sinks)
        else:
            _check_cache(cache, x.shape[1], segments, self.config)
            offset, capacity = cache.length, cache.keys.shape[1]
            cache = cache.extended(k, v)
            k, v = cache.keys.astype(x.dtype), cache.values.astype(x.dtype)
            mixed = attend(q, k, v, self.config, q_offset=offset, sinks=sinks)
            mixed = jnp.where(cache.length <= capacity, mixed, jnp.nan)
        out = jnp.einsum("bthc,hcd->btd", mixed, self.out[...].astype(x.dtype))
        return Output(out, {}, {}), cache

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries and keys, normed and rotated, and values."""
        q, k, v = (
            jnp.einsum("btd,dhc->bthc", x, w[...].astype(x.dtype))
            for w in (self.query, self.key, self.value)
        )
        if self.config.qk_norm:
            q, k = _norm(q, self.query_norm[...]), _norm(k, self.key_norm[...])
        theta = self.config.rope_theta
        return rope(q, positions, theta=theta), rope(k, positions, theta=theta), v


def attend(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    v: Float[Array, "b s g c"],
    config: AttentionConfig,
    *,
    q_offset: int | Int[Array, ""] = 0,
    segments: Segments | None = None,
    sinks: Float[Array, " h"] | None = None,
) -> Float[Array, "b t h c"]:
    """Attend as the config says, on any mesh.

    Batch and heads are cut as the mesh asks. Along the mesh axis ``context`` queries
    stay where they are, keys and values are gathered, and each device walks the mask's
    rows of its own queries.

    Raises:
        ValueError: if the queries do not fall into whole blocks per context device.
    """
    parts = _context_parts()
    mask = _mask(config, q.shape[1], k.shape[1], q_offset=q_offset, parts=parts)

    def local(q, k, v, mask, sinks, *segments):
        first = jax.lax.axis_index("context") * q.shape[1] if parts > 1 else 0
        mask = mask.replace(q_len=q.shape[1], q_offset=mask.q_offset + first)
        return block_sparse_attention(
            q,
            k,
            v,
            mask,
            softcap=config.softcap,
            sinks=sinks,
            segments=Segments(*segments) if segments else None,
            implementation=config.implementation,
        )

    inputs = ["b t h c", "b s g c", "b s g c", mask.axes()]
    inputs.append(None if sinks is None else "h")
    if segments is not None:
        inputs += ["b t", "b s"]
    run = per_shard(local, inputs=tuple(inputs), outputs="b t h c")
    return run(q, k, v, mask, sinks, *(segments or ()))


def _mask(
    config: AttentionConfig, t: int, s: int, *, q_offset: Any, parts: int
) -> BlockMask:
    """The config's mask, which has to fall into ``parts`` along the queries."""
    block_q = min(config.block_q, t)
    if t % (parts * block_q) and parts > 1:
        raise ValueError(
            f"{t} tokens in blocks of {block_q} do not divide over {parts} context"
            " devices; choose block_q so that each gets whole blocks"
        )
    mask = BlockMask.from_pattern(
        config.build(),
        q_len=t,
        kv_len=s,
        block_q=block_q,
        block_kv=min(config.block_kv, s),
        q_offset=q_offset,
    )
    return jax.tree.map(jnp.asarray, mask)


def _context_parts() -> int:
    """Number of devices along the sequence."""
    if axis("context") is None:
        return 1
    return jax.sharding.get_abstract_mesh().shape["context"]


def _norm(x: Float[Array, "b t h c"], scale: Float[Array, " c"]) -> Array:
    """Divide by the root mean square over the head's width, in float32."""
    wide = x.astype("float32")
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * scale[None, None, None]).astype(x.dtype)


def _check_cache(
    cache: Cache, tokens: int, segments: Array | None, config: AttentionConfig
) -> None:
    if segments is not None:
        raise ValueError(
            "cache and segments exclude each other; give each document its own cache"
        )
    if not config.build().is_causal:
        raise ValueError(
            f"pattern={config.pattern!r} reads the future, which a cache does not have"
        )
    capacity = cache.keys.shape[1]
    known = 0 if isinstance(cache.length, Tracer) else int(cache.length)
    if known + tokens > capacity:
        raise ValueError(
            f"{known} cached and {tokens} new tokens overflow the cache's capacity of"
            f" {capacity}; make it larger"
        )
