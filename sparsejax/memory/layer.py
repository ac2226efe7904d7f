"""Memory layers: tokens in, an ``Output`` with the values that their queries found.

Every layer is ``Layer(config, width, *, init_scale, rngs)``; ``init_scale`` multiplies
the standard deviation of the weights that write to the residual stream. Queries, keys
and the softmax over hits are float32; values are summed in float32 and written in the
dtype of the input. Tables of ``m`` rows are read row by row, never as a whole.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.config import require
from sparsejax.memory.bag import embedding_bag
from sparsejax.memory.lookup import Hits, product_key_top_k
from sparsejax.memory.usage import usage
from sparsejax.typing import Array, Bool, Float, Int, Output

__all__ = ["MemoryConfig", "ProductKeyMemory", "ProductKeys", "merge_heads"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """A product-key memory that owns its values."""

    sub_keys: int  # r: sub-keys per half; the memory has r * r slots
    kind: Literal["product_key"] = "product_key"
    heads: int = 4
    per_head: int = 32  # slots that one head of one token reads
    key_width: int = 256  # of both halves together
    query_norm: Literal["layer", "rms", "none"] = "layer"
    value_width: int | None = None  # None: the model's width
    gate: Literal["none", "swilu"] = "none"  # silu(x W) times the value

    def __post_init__(self) -> None:
        check_lookup(self)
        check_value_width(self.value_width)

    @property
    def slots(self) -> int:
        """Rows of the value table."""
        return self.sub_keys**2


@runtime_checkable
class Lookup(Protocol):
    """The fields that every config of a product-key lookup has."""

    @property
    def sub_keys(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def per_head(self) -> int: ...
    @property
    def key_width(self) -> int: ...


def check_lookup(config: Lookup) -> None:
    """Raise ``FieldError`` unless product-key lookup can run with these numbers."""
    sub_keys, heads = config.sub_keys, config.heads
    per_head, key_width = config.per_head, config.key_width
    require(1 <= sub_keys <= 46340, "sub_keys", sub_keys, "must be in 1..46340")
    require(heads >= 1, "heads", heads, "must be at least 1")
    rule = f"must be in 1..{sub_keys**2}, the slots of sub_keys={sub_keys}"
    require(1 <= per_head <= sub_keys**2, "per_head", per_head, rule)
    rule = "must be even and at least 2; each half has its own sub-keys"
    require(key_width >= 2 and key_width % 2 == 0, "key_width", key_width, rule)


def check_value_width(value_width: int | None) -> None:
    """Raise ``FieldError`` unless the width is a positive number or absent."""
    rule = "must be at least 1, or none for the model's width"
    require(value_width is None or value_width >= 1, "value_width", value_width, rule)


def normalize(
    x: Float[Array, "*rows c"], kind: Literal["layer", "rms", "none"]
) -> Float[Array, "*rows c"]:
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

    def __call__(
        self, x: Float[Array, "n d"], *, k: int, norm: Literal["layer", "rms", "none"]
    ) -> Hits:
        """Find the best slots of every head."""
        x = x.astype(jnp.float32)
        query = normalize(jnp.einsum("nd,dhc->nhc", x, self.query[...]), norm)
        return product_key_top_k(query, self.keys[...], k=k)


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
        self.gate = self.out = None
        if gate == "swilu":
            weight = normal(rngs.params(), (width, inner), width**-0.5)
            self.gate = nnx.Param(weight, axes="d f")
        if gate == "swilu" or inner != width:
            weight = normal(rngs.params(), (inner, width), init_scale * inner**-0.5)
            self.out = nnx.Param(weight, axes="f d")

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
    normalised over their own channels, not over the batch, so that no token sees
    another; the query has no bias; value width and gate as in ``MemoryPlus``.
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
        self.values = nnx.Param(values, axes="m d")

    def __call__(
        self, x: Float[Array, "b t d"], *, valid: Bool[Array, "b t"] | None = None
    ) -> Output:
        """Read the memory once for every token; only ``valid`` ones are counted."""
        config, rows = self.config, x.reshape(-1, x.shape[-1])
        hits = self.lookup(rows, k=config.per_head, norm=config.query_norm)
        weights = jax.nn.softmax(hits.scores)
        read = embedding_bag(self.values[...], *merge_heads(hits.ids, weights))
        value = self.write(rows, read).reshape(x.shape)
        return Output(
            value, {}, usage(hits.ids, weights, slots=config.slots, valid=valid)
        )
