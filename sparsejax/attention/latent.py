"""Latent attention: keys and values of all heads are made of one narrow vector a token.

``LatentAttention(config, width, heads, kv_heads, *, init_scale, rngs)`` is called as
``Attention`` is. Each head's key is ``n`` channels of that vector's and ``p`` that see
the position, which all heads share. A cache keeps "b 1 s c": the vector, then the
rotated channels. Few new tokens read it as it is, with queries mapped to it; for many
it costs less to make every head's keys and values again.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention.config import AttentionConfig
from sparsejax.attention.layer import Cache, given, mixer_of, remembered, written
from sparsejax.attention.rope import head_norm, rope
from sparsejax.attention.selectors import Sizes
from sparsejax.typing import Array, Float, Int, Output

__all__ = ["LatentAttention", "absorb", "expand"]


def expand(
    keys: Float[Array, "b s 1 c"], up: Float[Array, "z h _"], *, plain: int
) -> tuple[Float[Array, "b s h _"], Float[Array, "b s h _"]]:
    """Make every head's keys and values.

    Args:
        keys: the narrow vectors, then the rotated channels that all heads share.
        up: from the narrow vector to each head's plain channels and values.
        plain: how many channels of ``up`` are the keys'.

    Source: DeepSeek-AI 2024, arXiv:2405.04434, Eq. 9-11, 16.
    """
    rank = up.shape[0]
    both = jnp.einsum("bsz,zhc->bshc", keys[:, :, 0, :rank], up)
    turned = keys[..., rank:]
    turned = jnp.broadcast_to(turned, (*both.shape[:3], turned.shape[-1]))
    return jnp.concatenate([both[..., :plain], turned], -1), both[..., plain:]


def absorb(
    q: Float[Array, "b t h c"], up: Float[Array, "z h _"], *, plain: int
) -> Float[Array, "b t h _"]:
    """Map queries to where their products with cached vectors are those with keys.

    Source: DeepSeek-AI 2024, arXiv:2405.04434, Sec. 2.1.2.
    """
    inner = jnp.einsum("bthc,zhc->bthz", q[..., :plain], up[..., :plain])
    return jnp.concatenate([inner, q[..., plain:]], -1)


class LatentAttention(nnx.Module):
    """Attention whose cache is one narrow vector and one rotated key a token.

    Source: DeepSeek-AI 2024, arXiv:2405.04434, Sec. 2.1.2-2.1.3; DeepSeek-AI 2024,
    arXiv:2412.19437, Sec. 2.1.1.
    """

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
        if config.latent is None or kv_heads != heads:
            raise ValueError(
                f"latent={config.latent}, kv_heads={kv_heads}: LatentAttention needs a"
                f" LatentConfig, and kv_heads={heads}, for every head has its own keys"
            )
        self.config, self.latent = config, config.latent
        latent, (c, v) = config.latent, config.widths(width, heads)
        rank, turned = latent.kv_rank, latent.rotated_width

        def drawn(axes: str, *shape: int, over: int, scale: float = 1.0) -> nnx.Param:
            values = jax.random.normal(rngs.params(), shape) * scale * over**-0.5
            return nnx.Param(values, axes=axes)

        if latent.query_rank is None:
            self.query = drawn("d h c", width, heads, c, over=width)
        else:
            q = latent.query_rank
            self.query_down = drawn("d c", width, q, over=width)
            self.query_up = drawn("z h c", q, heads, c, over=q)
        self.down = drawn("d c", width, rank + turned, over=width)
        inner = latent.plain_width + v
        self.up = drawn("z h c", rank, heads, inner, over=rank)
        self.out = drawn("h c d", heads, v, width, over=heads * v, scale=init_scale)
        self._extras(heads, width)
        self.mixer = mixer_of(config, Sizes(width, heads, heads, c), rngs=rngs)
        scaling = config.rope_scaling
        self.scale = c**-0.5 * (1.0 if scaling is None else scaling.logit_gain)

    def _extras(self, heads: int, width: int) -> None:
        """Make the norms and biases that the config asks for: ones, and zeros."""
        config, latent = self.config, self.latent
        if config.qk_norm:
            self.latent_norm = nnx.Param(jnp.ones(latent.kv_rank), axes="c")
        if config.qkv_biases:
            wide = latent.kv_rank + latent.rotated_width
            self.down_bias = nnx.Param(jnp.zeros(wide), axes="c")
        if latent.query_rank is not None and config.qk_norm:
            self.query_norm = nnx.Param(jnp.ones(latent.query_rank), axes="c")
        if latent.query_rank is not None and config.qkv_biases:
            self.query_down_bias = nnx.Param(jnp.zeros(latent.query_rank), axes="c")
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(width), axes="d")
        sinks = jnp.zeros(heads)
        self.sinks = nnx.Param(sinks, axes="h") if config.learned_sinks else None

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
            ValueError: as ``Attention`` does.
        """
        plain, rank = self.latent.plain_width, self.latent.kv_rank
        q, keys = self._queries(x, positions), self._keys(x, positions)
        context = given(self, x, positions, segments)._replace(scale=self.scale)
        if cache is not None:
            cache, context = remembered(self.mixer, cache, keys, None, context)
            keys = cache.keys.swapaxes(1, 2).astype(x.dtype)
        up = self.up[...].astype(x.dtype)
        if cache is None or not self.absorbs(x.shape[1]):
            k, v = expand(keys, up, plain=plain)
            context = context._replace(summaries={})  # they are not of these keys
            return written(self, self.mixer(q, k, v, x, context), cache), cache
        q, context = absorb(q, up, plain=plain), context._replace(keys="b s 1 c")
        mixed = self.mixer(q, keys, keys, x, context)
        inner = mixed.values[..., :rank]
        values = jnp.einsum("bthz,zhc->bthc", inner, up[..., plain:])
        return written(self, mixed._replace(values=values), cache), cache

    def absorbs(self, tokens: int) -> bool:
        """Whether so many new tokens read a cache at less cost than making its keys.

        For each cached token, making them takes ``rank (n + v)`` products a head, and
        reading it as it is ``2 rank - n - v`` more for each new token.
        """
        rank, inner = self.latent.kv_rank, self.up.shape[-1]
        return tokens * (2 * rank - inner) < rank * inner

    def _turned(self, x: Array, positions: Array) -> Array:
        config = self.config
        if self.latent.interleaved:
            pairs = x.reshape(*x.shape[:-1], -1, 2)
            x = pairs.swapaxes(-1, -2).reshape(x.shape)
        turning = {"theta": config.rope_theta, "scaling": config.rope_scaling}
        return rope(x, positions, **turning)

    def _queries(self, x: Array, positions: Array) -> Float[Array, "b t h c"]:
        config, latent = self.config, self.latent
        if latent.query_rank is None:
            weight = self.query
        else:
            x = x @ self.query_down[...].astype(x.dtype)
            if config.qkv_biases:
                x = x + self.query_down_bias[...].astype(x.dtype)[None, None]
            if config.qk_norm:
                x = _normed(x, self.query_norm[...], config.norm_epsilon)
            weight = self.query_up
        q = jnp.einsum("btd,dhc->bthc", x, weight[...].astype(x.dtype))
        turned = self._turned(q[..., latent.plain_width :], positions)
        return jnp.concatenate([q[..., : latent.plain_width], turned], -1)

    def _keys(self, x: Array, positions: Array) -> Float[Array, "b t 1 c"]:
        config, rank = self.config, self.latent.kv_rank
        keys = x @ self.down[...].astype(x.dtype)
        if config.qkv_biases:
            keys = keys + self.down_bias[...].astype(x.dtype)[None, None]
        inner = keys[..., :rank]
        if config.qk_norm:
            inner = _normed(inner, self.latent_norm[...], config.norm_epsilon)
        turned = self._turned(keys[..., None, rank:], positions)
        return jnp.concatenate([inner[:, :, None], turned], -1)


def _normed(x: Float[Array, "b t c"], scale: Array, epsilon: float) -> Array:
    return head_norm(x[:, :, None], scale, epsilon=epsilon)[:, :, 0]
