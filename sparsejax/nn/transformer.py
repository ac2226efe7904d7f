"""The decoder-only Transformer: tokens in, logits, losses, metrics and caches out."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention import Sizes, empty_cache
from sparsejax.memory import MemoryPlusConfig, ValuePool
from sparsejax.moe import MoEConfig
from sparsejax.nn.blocks import RMSNorm
from sparsejax.nn.config import LayerSpec, ModelConfig, runs
from sparsejax.nn.stack import Stack
from sparsejax.partition import constrain
from sparsejax.typing import Array, Float, Int, PRNGKeyArray, PyTree

__all__ = ["Hidden", "Transformer"]

FEW = 16  # tokens for which it is the table that must not be moved
VOCABULARY_MULTIPLE = 64  # so that the table can be cut along any usual mesh axis


class Hidden(NamedTuple):
    """The last layer's normed output, and what the layers said beside it."""

    value: Float[Array, "b t d"]
    losses: dict[
        str, Float[Array, ""]
    ]  # weighted, averaged over the layers that have it
    metrics: dict[str, Array]  # leading axis: those layers, in order
    caches: PyTree


class Transformer(nnx.Module):
    """A stack of blocks between an embedding and its (tied) transpose."""

    def __init__(self, config: ModelConfig, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vocabulary = vocabulary
        if isinstance(config.ffn, MoEConfig):
            config.ffn.check_vocabulary(vocabulary)
        rows = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        init = jax.nn.initializers.normal(config.width**-0.5)
        self.embedding = nnx.Param(
            init(rngs.params(), (rows, config.width)), axes="v d"
        )
        if isinstance(config.memory, MemoryPlusConfig):
            self.pool = ValuePool(
                config.memory,
                config.width,
                readers=len(config.memory_layers),
                init_scale=(2 * config.depth) ** -0.5,
                rngs=rngs,
            )
        self.stacks = nnx.List(Stack(run, config, rngs=rngs) for run in runs(config))
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        if not config.tied:
            table = init(rngs.params(), (config.width, rows))
            self.unembedding = nnx.Param(table, axes="d v")

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        previous: Int[Array, " b"] | None = None,
        caches: PyTree = None,
        key: PRNGKeyArray | None = None,
    ) -> Hidden:
        """Run all layers.

        Args:
            tokens: token ids below the vocabulary's size.
            positions: of each token in its document; counted from the cache's end, or
                from 0, where not given.
            segments: documents of a packed row, from 1; 0 is padding.
            previous: the id before each row's first, where the row goes on from there.
            caches: from ``empty_caches``, or a call before.
            key: random key in training, None otherwise.
        """
        if positions is None:
            start = 0 if caches is None else caches[0][0].length[0]
            count = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(count, tokens.shape)
        context = {"positions": positions, "segments": segments, "tokens": tokens}
        context["previous"] = before(tokens, positions, previous)
        context["pool"] = self.pool.values[...] if hasattr(self, "pool") else None
        context["reader"] = 0
        x = self.embed(tokens)
        asides, filled = [], []
        for index, stack in enumerate(self.stacks):
            context["key"] = None if key is None else jax.random.fold_in(key, index)
            cache = [None] * len(stack.blocks) if caches is None else caches[index]
            x, aside, cache = stack(x, cache, context)
            context["reader"] += stack.repeats * sum(stack.readers)
            asides.append(aside)
            filled.append(cache)
        losses, metrics = self._in_layer_order(asides)
        means = {k: jnp.mean(v) for k, v in losses.items()}
        return Hidden(self.norm(x), means, metrics, None if caches is None else filled)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Score every token of the (padded) vocabulary; padding scores -inf."""
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if self.config.tied and x.shape[0] * x.shape[1] <= FEW:
            table = constrain(self.embedding[...], "v d").astype(x.dtype)
            scores = product("vd,btd->vbt", table, x).transpose(1, 2, 0)
        else:
            table = self.embedding[...].T if self.config.tied else self.unembedding[...]
            table = constrain(table, "d v").astype(x.dtype)
            scores = product("btd,dv->btv", x, table)
        real = jnp.arange(scores.shape[-1]) < self.vocabulary
        scores = jnp.where(real[None, None], scores, -jnp.inf)
        return constrain(scores, "b t v")

    def empty_caches(self, batch: int, capacity: int) -> PyTree:
        """Give caches for ``capacity`` tokens, for every layer."""
        config = self.config
        width = config.attention.widths(config.width, config.heads).keys
        sizes = Sizes(config.width, config.heads, config.kv_heads, width)
        dtype = jnp.dtype(config.dtype)

        def stacked(spec: LayerSpec, repeats: int) -> Any:
            one = empty_cache(spec.attention, sizes, batch, capacity, dtype=dtype)
            return jax.tree.map(lambda x: jnp.stack([x] * repeats), one)

        return [[stacked(x, run.repeats) for x in run.period] for run in runs(config)]

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Give what the first layer reads."""
        table = constrain(self.embedding[...], "v d")
        scale = self.config.embedding_scale
        x = table[tokens]
        if scale != 1:
            x = x * (self.config.width**0.5 if scale is None else scale)
        return constrain(x.astype(self.config.dtype), "b t d")

    def _in_layer_order(self, asides: list[Any]) -> tuple[dict, dict]:
        """Join what the runs' members returned, by name, in the order of the layers."""
        gathered: tuple[dict, dict] = ({}, {})
        for run, members in zip(runs(self.config), asides, strict=True):
            for offset, aside in enumerate(members):
                layers = [
                    run.start + offset + repeat * len(run.period)
                    for repeat in range(run.repeats)
                ]
                for target, values in zip(gathered, aside, strict=True):
                    for name, value in values.items():
                        target.setdefault(name, []).append((layers, value))
        losses, metrics = (
            {name: _joined(parts) for name, parts in sorted(target.items())}
            for target in gathered
        )
        return losses, metrics


def before(
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    previous: Int[Array, " b"] | None,
) -> Int[Array, "b t"]:
    """Give the id before each token in its document; -1 before the first."""
    first = jnp.full_like(tokens[:, 0], -1) if previous is None else previous
    shifted = jnp.concatenate([first[:, None], tokens[:, :-1]], axis=1)
    return jnp.where(positions == 0, -1, shifted)


def _joined(parts: list[tuple[list[int], Array]]) -> Array:
    layers = [layer for of, _ in parts for layer in of]
    order = sorted(range(len(layers)), key=layers.__getitem__)
    return jnp.concatenate([value for _, value in parts])[jnp.array(order)]
