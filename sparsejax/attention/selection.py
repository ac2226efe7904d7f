"""What selectors share: the means of blocks, and the best of what is allowed.

Scores are float32 "b h t j", ``1`` where batch or heads share them: one for each query
and key block. Selection passes no gradient; ties go to the lower block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.attention.context import Place
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.patterns import Pattern, causal
from sparsejax.ranking import top_k
from sparsejax.typing import Array, Bool, Float, Int

__all__ = [
    "best",
    "block_means",
    "blocks_of",
    "choose",
    "in_chunks",
    "products",
    "region_means",
    "same_document",
    "visible_keys",
]


def blocks_of(x: Array, block: int) -> Array:
    """Cut axis 1 into whole blocks, with zeros at the end: "b s …" to "b j w …"."""
    columns = -(-x.shape[1] // block)
    edge = columns * block - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, edge), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(x.shape[0], columns, block, *x.shape[2:])


def block_means(
    k: Float[Array, "b s g c"], block: int, place: Place
) -> Float[Array, "b j g c"]:
    """Mean of each whole block's keys, in float32.

    Of several documents in a block only the last counts, the only one that queries of
    later blocks can belong to.
    """
    cut = blocks_of(k.astype("float32"), block)
    if place.segments is None:
        return cut.mean(axis=2)
    numbers = blocks_of(place.segments.kv, block)
    mine = (numbers == numbers[:, :, -1:]).astype("float32")
    total = (cut * mine[..., None, None]).sum(axis=2)
    return total / mine.sum(axis=2)[..., None, None]


def region_means(x: Float[Array, "b t h c"], block: int) -> Float[Array, "b i h c"]:
    """Mean of each block's real vectors, in float32."""
    cut = blocks_of(x.astype("float32"), block)
    there = blocks_of(jnp.ones((1, x.shape[1], 1, 1)), block).sum(axis=2)
    return cut.sum(axis=2) / there


def same_document(place: Place, block: int) -> Bool[Array, "_ 1 t j"]:
    """Whether the block's last document is the query's."""
    if place.segments is None:
        return jnp.ones((1, 1, 1, 1), bool)
    last = blocks_of(place.segments.kv, block)[:, :, -1]
    q = place.segments.q
    return ((q[:, :, None] == last[:, None]) & (q != 0)[:, :, None])[:, None]


def products(
    q: Float[Array, "b t h c"], means: Float[Array, "b j g c"]
) -> Float[Array, "b h t j"]:
    """Products of every query with its key head's blocks, in float32."""
    b, t, h, c = q.shape
    grouped = q.astype("float32").reshape(b, t, means.shape[2], -1, c)
    scores = jnp.einsum("btgrc,bjgc->bgrtj", grouped, means)
    return scores.reshape(b, h, t, -1)


def visible_keys(
    i: Int[Array, "b t"], kv_len: int, place: Place, *numbers: Int[Array, "b t"]
) -> Bool[Array, "b t s"]:
    """Which single keys lie at or before each query, in its document.

    Args:
        i: positions of the queries, which with ``numbers`` are ``place.rows``.
        kv_len: number of keys.
        place: of the queries.
        numbers: documents of the queries, if there are several.
    """
    seen = i[:, :, None] >= jnp.arange(kv_len, dtype="int32")[None, None]
    if place.segments is None:
        return seen
    (q,) = numbers
    same = q[:, :, None] == place.segments.kv[:, None]
    return seen & same & (q != 0)[:, :, None]


def in_chunks(function: Callable[..., Any], size: int, *arrays: Array) -> Any:
    """Apply a function of arrays "b t …" to some queries at a time, to save memory."""
    b, t = arrays[0].shape[:2]
    size = max(1, size)
    if t <= size:
        return function(*arrays)
    chunks = -(-t // size)

    def cut(x: Array) -> Array:
        edge = [(0, 0), (0, chunks * size - t), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, edge, mode="edge")
        return jnp.moveaxis(x.reshape(b, chunks, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :t]

    found = jax.lax.map(lambda each: function(*each), tuple(map(cut, arrays)))
    return jax.tree.map(join, found)


def best(
    scores: Float[Array, "b h t j"],
    allowed: Bool[Array, "_ _ t j"],
    *,
    top: int,
    forced: Bool[Array, "_ _ _ _"] | None = None,
) -> tuple[Int[Array, "b h t k"], Int[Array, "b h t"]]:
    """Ids of the best allowed blocks, forced ones first, and how many there are."""
    scores = jnp.maximum(jax.lax.stop_gradient(scores), jnp.finfo("float32").min)
    if forced is not None:
        scores = jnp.where(forced & allowed, jnp.inf, scores)
    scores = jnp.where(allowed, scores, -jnp.inf)
    count = jnp.broadcast_to(allowed, scores.shape).sum(-1, dtype="int32")
    # Without a barrier every pass over them reads a product's own, turned order.
    scores = jax.lax.optimization_barrier(scores)
    return top_k(scores, top), jnp.minimum(count, top)


def choose(
    scores: Float[Array, "b h t j"],
    allowed: Bool[Array, "_ _ t j"],
    *,
    top: int,
    kv_len: int,
    block_kv: int,
    place: Place,
    forced: Bool[Array, "_ _ _ _"] | None = None,
    pattern: Pattern | None = causal(),  # noqa: B008  patterns are constants
) -> BlockMask:
    """The best allowed blocks of every query as a mask with a list for each."""
    ids, count = best(scores, allowed, top=top, forced=forced)
    return BlockMask.from_blocks(
        ids,
        count,
        q_len=scores.shape[2],
        kv_len=kv_len,
        block_q=1,
        block_kv=block_kv,
        pattern=pattern,
        q_offset=place.q_offset,
    )
