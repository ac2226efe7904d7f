"""Memory layers: tokens in, an ``Output`` with the values that their queries found.

Every layer is ``Layer(config, width, *, init_scale, rngs)``; ``init_scale`` multiplies
the standard deviation of the weights that write to the residual stream. Queries, keys
and the softmax over hits are float32; values are summed in float32 and written in the
dtype of the input. Tables of ``m`` rows are read row by row, never as a whole. Queries
normed over the batch have ``QueryMoments``, state that no gradient reaches: in training
a layer reports ``metrics["evidence/queries"]``, and whoever owns the step writes
``moved_moments`` of it afterwards. Where they ``rest`` they norm in training, too.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.memory.bag import embedding_bag
from sparsejax.memory.config import Lookup, MemoryConfig, MemoryPlusConfig
from sparsejax.memory.lookup import Hits, product_key_top_k
from sparsejax.memory.table import Table
from sparsejax.memory.usage import counts_of, mean_of_valid, usage
from sparsejax.typing import Array, Bool, Float, Int, Output, PRNGKeyArray

__all__ = [
    "MemoryPlus",
    "ProductKeyMemory",
    "ProductKeys",
    "QueryMoments",
    "ValuePool",
    "Writer",
    "batch_moments",
    "merge_heads",
    "moved_moments",
    "normal",
    "normalize",
    "rest_moments",
]


Norm = Literal["batch", "layer", "rms", "none"]
MOMENTUM = 0.1  # of moments: a step's share in what evaluation uses


def normalize(x: Float[Array, "*rows c"], kind: Norm) -> Float[Array, "*rows c"]:
    """Normalise the last axis in float32, without a scale: the other operand has it."""
    x = x.astype(jnp.float32)
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def normal(key: Array, shape: tuple[int, ...], deviation: float) -> Array:
    """Draw float32 weights of a given standard deviation."""
    return deviation * jax.random.normal(key, shape, jnp.float32)


def merge_heads(
    ids: Int[Array, "n h k"], weights: Float[Array, "n h k"]
) -> tuple[Int[Array, "n q"], Float[Array, "n q"]]:
    """All slots of a token in one row: heads share the table and are summed."""
    n, h, k = ids.shape
    return ids.reshape(n, h * k), weights.reshape(n, h * k)


def standardize(
    x: Float[Array, "n h c"], moments: Float[Array, "2 h c"]
) -> Float[Array, "n h c"]:
    """Subtract the mean and divide by the deviation, each channel's own.

    Args:
        moments: the mean, and the variance.
    """
    return (x - moments[0][None]) * jax.lax.rsqrt(moments[1] + 1e-5)[None]


class QueryMoments(nnx.Variable):
    """Running mean of queries and of their squares; no gradient reaches it."""


def moved_moments(
    moments: Float[Array, "*l 2 h c"], sums: Float[Array, "*l 3 h c"]
) -> Float[Array, "*l 2 h c"]:
    """Move running moments towards those of a batch, if it had any tokens.

    Args:
        sums: of queries, of their squares, and, last, their number.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 2. Departure: an exponential
    average, of squares and not of variances, so that batches may differ in their mean.
    """
    count = sums[..., 2:, :, :]
    found = sums[..., :2, :, :] / jnp.maximum(count, 1e-9)
    return jnp.where(count > 0, moments + MOMENTUM * (found - moments), moments)


class ProductKeys(nnx.Module):
    """Queries of each head, and the sub-keys that they are compared with."""

    def __init__(self, config: Lookup, width: int, *, rngs: nnx.Rngs):
        heads, key_width = config.heads, config.key_width
        query = normal(rngs.params(), (width, heads, key_width), width**-0.5)
        self.query = nnx.Param(query, axes="d h c")
        shape, bound = (heads, 2, config.sub_keys, key_width // 2), key_width**-0.5
        keys = jax.random.uniform(
            rngs.params(), shape, jnp.float32, minval=-bound, maxval=bound
        )
        self.keys = nnx.Param(keys, axes="h 2 r c")
        self.implementation = config.implementation
        if config.query_norm == "batch":
            start = jnp.zeros((2, heads, key_width), jnp.float32).at[1].set(1)
            self.moments = QueryMoments(start, axes="2 h c")
        self.rests = False

    def queries(self, x: Float[Array, "n d"]) -> Float[Array, "n h c"]:
        """Give the query of every head, not normed yet."""
        return jnp.einsum("nd,dhc->nhc", x.astype(jnp.float32), self.query[...])

    def moments_of(
        self, x: Float[Array, "n d"], valid: Bool[Array, "b t"] | None
    ) -> tuple[Float[Array, "2 h c"], Float[Array, "3 h c"]]:
        """Give mean and variance of the valid tokens' queries, and what runs of them.

        That is their sum, the sum of their squares, and their number.
        """
        queries, counted = self.queries(x), counts_of(valid, x.shape[0])
        mean = mean_of_valid(queries, valid)
        variance = mean_of_valid(jnp.square(queries - mean[None]), valid)
        parts = jnp.stack([queries, jnp.square(queries), jnp.ones_like(queries)])
        sums = jnp.einsum("n,pnhc->phc", counted, jax.lax.stop_gradient(parts))
        return jnp.stack([mean, variance]), sums

    def __call__(
        self,
        x: Float[Array, "n d"],
        *,
        k: int,
        norm: Norm,
        gain: Float[Array, " h"] | None = None,
        moments: Float[Array, "2 h c"] | None = None,
    ) -> Hits:
        """Find the best slots of every head.

        Args:
            k: slots per head.
            norm: what is done to the query of each head.
            moments: mean and variance of the batch, for its norm; None takes those
                that run.
            gain: if given, each half of every query and key is divided by its root
                mean square, and scores are multiplied by the gain of their head.
        """
        query, keys = self.queries(x), self.keys[...]
        if norm == "batch":
            mean, square = self.moments[...]
            running = jnp.stack([mean, jnp.maximum(square - jnp.square(mean), 0)])
            query = standardize(query, running if moments is None else moments)
        else:
            query = normalize(query, norm)
        if gain is not None:
            halves = query.reshape(*query.shape[:2], 2, keys.shape[-1])
            query = normalize(halves, "rms").reshape(query.shape) * gain[None, :, None]
            keys = normalize(keys, "rms")
        return product_key_top_k(query, keys, k=k, implementation=self.implementation)


def batch_moments(
    lookup: ProductKeys,
    rows: Float[Array, "n d"],
    valid: Bool[Array, "b t"] | None,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "2 h c"] | None, dict[str, Array]]:
    """Give the moments that a batch's queries are normed by, and report them.

    Neither is there outside of training, where moments rest, or for another norm.
    """
    if key is None or lookup.rests or not hasattr(lookup, "moments"):
        return None, {}
    moments, sums = lookup.moments_of(rows, valid)
    return moments, {"evidence/queries": sums}


def rest_moments(model: nnx.Module) -> None:
    """Let queries be normed by the running moments in training, as in evaluation.

    Else a model whose moments stay would be another one when it is evaluated.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, ProductKeys):
            module.rests = True


def _projects(inner: int, width: int, gate: str) -> bool:
    """Whether values read are projected, or write to the residual stream themselves."""
    return gate == "swilu" or inner != width


class Writer(nnx.Module):
    """What becomes of the values read: ``(silu(x gate) * read) out``, or less.

    Without a gate nothing is multiplied; with neither a gate nor a width to change,
    the values are the output.
    """

    def __init__(
        self,
        inner: int,
        width: int,
        *,
        gate: Literal["none", "swilu"],
        init_scale: float,
        rngs: nnx.Rngs,
    ):
        weight = normal(rngs.params(), (width, inner), width**-0.5)
        self.gate = nnx.Param(weight, axes="d f") if gate == "swilu" else None
        weight = normal(rngs.params(), (inner, width), init_scale * inner**-0.5)
        projects = _projects(inner, width, gate)
        self.out = nnx.Param(weight, axes="f d") if projects else None

    def __call__(
        self, x: Float[Array, "n d"], read: Float[Array, "n f"]
    ) -> Float[Array, "n d"]:
        """Gate and project, in the dtype of ``x``."""
        read = read.astype(x.dtype)
        if self.gate is not None:
            read = jax.nn.silu(x @ self.gate[...].astype(x.dtype)) * read
        return read if self.out is None else read @ self.out[...].astype(x.dtype)


class ProductKeyMemory(nnx.Module):
    """Sum the values of the best slots, weighted by a softmax over each head's hits.

    Source: Lample et al. 2019, arXiv:1907.05242, Sec. 3. Departure: queries are
    normalised over their own channels by default, and over the batch, where training
    lets a token see others, with ``query_norm="batch"``; the query has no bias; value
    width and gate as in ``MemoryPlus``.
    """

    def __init__(
        self,
        config: MemoryConfig,
        width: int,
        *,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.config = config
        inner = config.value_width or width
        self.lookup = ProductKeys(config, width, rngs=rngs)
        self.write = Writer(
            inner, width, gate=config.gate, init_scale=init_scale, rngs=rngs
        )
        # Values that nothing projects write to the residual stream themselves.
        scale = init_scale if self.write.out is None else 1.0
        values = normal(rngs.params(), (config.slots, inner), scale * inner**-0.5)
        self.values = nnx.Param(values, axes="m d", reads=config.reads)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Read the memory once for every token; only ``valid`` ones are counted.

        Args:
            x: hidden states.
            valid: False for padding.
            key: random key in training, None otherwise; it says which is the case.
        """
        rows = x.reshape(-1, x.shape[-1])
        moments, seen = batch_moments(self.lookup, rows, valid, key)
        ids, weights = self.choose(rows, moments)
        read = embedding_bag(self.values[...], *merge_heads(ids, weights))
        value = self.write(rows, read).reshape(x.shape)
        metrics = usage(ids, weights, slots=self.config.slots, valid=valid)
        return Output(value, {}, metrics | seen)

    def choose(
        self,
        rows: Float[Array, "n d"],
        moments: Float[Array, "2 h c"] | None = None,
    ) -> tuple[Int[Array, "n h k"], Float[Array, "n h k"]]:
        """Give the slots that each head reads, and their weights.

        Args:
            rows: hidden states.
            moments: of the batch that queries are normed over, in training.
        """
        config = self.config
        hits = self.lookup(
            rows, k=config.per_head, norm=config.query_norm, moments=moments
        )
        return hits.ids, jax.nn.softmax(hits.scores)


class ValuePool(nnx.Module):
    """The values that several ``MemoryPlus`` layers, the ``readers``, share."""

    def __init__(
        self,
        config: MemoryPlusConfig,
        width: int,
        *,
        readers: int = 1,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        inner = config.value_width or width
        scale = 1.0 if _projects(inner, width, config.gate) else init_scale
        values = normal(rngs.params(), (config.slots, inner), scale * inner**-0.5)
        self.values = nnx.Param(values, axes="m d", reads=config.reads, readers=readers)


class MemoryPlus(nnx.Module):
    """Read a pool of values that other layers read too; gate and project the result.

    Queries and sub-keys are the layer's own. With ``qk_norm`` both are normalised, each
    half by itself, so that no score exceeds ``key_width`` times the head's gain;
    ``query_norm`` comes before it, as in ``ProductKeyMemory``.

    Source: Berges et al. 2024, arXiv:2412.09764, Sec. 2. Departure: queries and keys
    are normalised per half, which keeps the lookup exact, with one learned gain per
    head (the released code does not normalise them); the query has no bias.
    """

    def __init__(
        self,
        config: MemoryPlusConfig,
        width: int,
        *,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.lookup = ProductKeys(config, width, rngs=rngs)
        gain = jnp.full(config.heads, config.key_width**-0.5, jnp.float32)
        self.gain = nnx.Param(gain, axes="h") if config.qk_norm != "none" else None
        self.write = Writer(
            config.value_width or width,
            width,
            gate=config.gate,
            init_scale=init_scale,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        pool: Float[Array, "m f"] | Table,
        *,
        valid: Bool[Array, "b t"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Read ``pool``, the values of a ``ValuePool``, once for every token.

        Args:
            x: hidden states.
            pool: the values.
            valid: False for padding.
            key: random key in training, None otherwise; it says which is the case.
        """
        config, rows = self.config, x.reshape(-1, x.shape[-1])
        if pool.shape[0] != config.slots:
            raise ValueError(
                f"pool of {pool.shape[0]} slots: must have sub_keys^2 = {config.slots};"
                " build it as ValuePool(config, width)"
            )
        moments, seen = batch_moments(self.lookup, rows, valid, key)
        hits = self.lookup(
            rows,
            k=config.per_head,
            norm=config.query_norm,
            gain=None if self.gain is None else self.gain[...],
            moments=moments,
        )
        weights = jax.nn.softmax(hits.scores)
        read = embedding_bag(pool, *merge_heads(hits.ids, weights))
        value = self.write(rows, read).reshape(x.shape)
        metrics = usage(hits.ids, weights, slots=config.slots, valid=valid)
        return Output(value, {}, metrics | seen)
