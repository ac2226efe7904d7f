"""One layer of the Transformer: attention and a feed-forward, each normed and added.

A feed-forward of any kind, dense, routed or looked up, is called as
``layer(x, valid=…) -> Output``, with what it names of the tokens' ids, the ids before
them, positions and a random key; what it is decides the name of its parameters' path
and of its metrics: ``ffn``, ``moe`` or ``memory``.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention import Attention, Cache, LatentAttention
from sparsejax.memory import MEMORIES
from sparsejax.moe import ACTIVATIONS, MoE
from sparsejax.nn.config import GatedConfig, LayerSpec, ModelConfig
from sparsejax.partition import constrain
from sparsejax.typing import Array, Bool, Float, Int, Output

__all__ = ["Block", "GatedFeedForward", "RMSNorm", "feed_forward_name", "rms_norm"]


def rms_norm(
    x: Float[Array, "*shape d"], scale: Float[Array, " d"], *, epsilon: float = 1e-6
) -> Float[Array, "*shape d"]:
    """Divide by the root mean square over the width, in float32.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    wide = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return (y * wide.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, width: int, *, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width), axes="d")
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Normalise each token."""
        return rms_norm(x, self.scale[...], epsilon=self.epsilon)


class GatedFeedForward(nnx.Module):
    """``(activation(x gate) * (x up)) down``.

    Source: Shazeer 2020, arXiv:2002.05202, Eq. 6.
    """

    def __init__(
        self,
        config: GatedConfig,
        width: int,
        *,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        init = jax.nn.initializers.lecun_normal()
        shape = (width, config.hidden)
        about = {"multiplies": True}  # x @ w is all that is done with them
        self.gate = nnx.Param(init(rngs.params(), shape), axes="d f", **about)
        self.up = nnx.Param(init(rngs.params(), shape), axes="d f", **about)
        down = init(rngs.params(), shape[::-1]) * init_scale
        self.down = nnx.Param(down, axes="f d", **about)

    def __call__(
        self, x: Float[Array, "b t d"], *, valid: Bool[Array, "b t"] | None = None
    ) -> Output:
        """Transform each token by itself."""
        del valid  # a dense layer treats padding like any other token
        down = self.down[...].astype(x.dtype)
        return Output(constrain(self.hidden(x), "b t f") @ down, {}, {})

    def hidden(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        """Give what the rows of ``down`` are multiplied by."""
        gate, up = (w[...].astype(x.dtype) for w in (self.gate, self.up))
        return ACTIVATIONS[self.config.activation](x @ gate) * (x @ up)


FEED_FORWARDS = {"gated": GatedFeedForward, "moe": MoE, **MEMORIES}
NAMES = {"gated": "ffn", "moe": "moe"} | dict.fromkeys(MEMORIES, "memory")


def feed_forward_name(spec: LayerSpec) -> str:
    """Name of a layer's feed-forward in paths and metrics: ffn, moe or memory."""
    return NAMES[spec.feed_forward.kind]


class Block(nnx.Module):
    """A pre-norm residual layer."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.name = feed_forward_name(spec)
        scale = (2 * config.depth) ** -0.5  # keeps the residual stream's variance
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        attend = Attention if spec.attention.latent is None else LatentAttention
        self.attention = attend(
            spec.attention,
            config.width,
            config.heads,
            config.kv_heads,
            init_scale=scale,
            rngs=rngs,
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        layer = FEED_FORWARDS[spec.feed_forward.kind]
        setattr(
            self,
            self.name,
            layer(spec.feed_forward, config.width, init_scale=scale, rngs=rngs),
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None,
        cache: Cache | None,
        **about: Any,
    ) -> tuple[Output, Cache | None]:
        """Return the layer's output, with losses and metrics, and the filled cache.

        Args:
            about: the tokens' ids, the ids before them, and a random key, for a
                feed-forward that names them.
        """
        mixed, cache = self.attention(
            self.attention_norm(x), positions=positions, segments=segments, cache=cache
        )
        x = constrain(x + mixed.value, "b t d")
        valid = None if segments is None else segments > 0
        layer = getattr(self, self.name)
        named = inspect.signature(type(layer).__call__).parameters
        about = {"positions": positions, **about}
        fed = layer(
            self.norm(x),
            valid=valid,
            **{name: value for name, value in about.items() if name in named},
        )
        losses = {f"attention/{k}": v for k, v in mixed.losses.items()}
        losses |= {f"{self.name}/{k}": v for k, v in fed.losses.items()}
        metrics = {f"attention/{k}": v for k, v in mixed.metrics.items()}
        metrics |= {f"{self.name}/{k}": v for k, v in fed.metrics.items()}
        return Output(constrain(x + fed.value, "b t d"), losses, metrics), cache
