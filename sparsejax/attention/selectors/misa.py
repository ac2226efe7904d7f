"""Mixture of indexer heads: a router lets few heads of a DSA indexer score the keys."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention.context import Place
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selection import (
    best,
    block_means,
    in_chunks,
    same_document,
    visible_keys,
)
from sparsejax.attention.selectors.dsa import CHUNK, DSAOptions, index, tokens
from sparsejax.attention.selectors.plain import Sizes, Work
from sparsejax.config import require
from sparsejax.ranking import top_k
from sparsejax.typing import Array, Float, Int

__all__ = ["MISAOptions", "misa", "routed_heads"]


@dataclass(frozen=True, kw_only=True)
class MISAOptions(DSAOptions):
    """An indexer's, and how many of its heads score which keys."""

    routed: int = 8  # heads that score for a query
    block: int = 128  # keys that the router sees as one
    candidates: int | None = None  # keys that all heads score again; none for no second

    def __post_init__(self) -> None:
        DSAOptions.__post_init__(self)
        fits = 1 <= self.routed <= self.heads
        rule = f"must be in 1..{self.heads}, the indexer's heads"
        require(fits, "routed", self.routed, rule)
        require(self.block >= 1, "block", self.block, "must be positive")
        enough = self.candidates is None or self.candidates >= self.top
        rule = f"must be at least top={self.top}, or none"
        require(enough, "candidates", self.candidates, rule)

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count chosen pairs, and the products of the routed heads and the router."""
        work = DSAOptions.work(self, tokens, block_kv, sizes)
        return work._replace(
            choosing=work.choosing * (self.routed / self.heads + 1 / self.block)
            + 2.0 * self.heads * self.width * tokens * (self.candidates or 0)
        )


def routed_heads(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s 1 c"],
    *,
    weights: Float[Array, "b t h"],
    routed: int,
    block: int,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> Int[Array, "b t k"]:
    """Give each query the indexer's heads with the most energy on the blocks behind it.

    Energy is the mean of ``|weight * relu(q . mean key)|`` over earlier whole blocks.

    Source: Zhou et al. 2026, arXiv:2605.07363, abstract. Departure: a query sees the
    blocks before its own; without one the first heads are taken.
    """
    means = block_means(k, block, place)[:, :, 0]
    products = jnp.einsum("bthc,bjc->bthj", q.astype("float32"), means)
    energy = jnp.abs(weights[..., None] * nnx.relu(products))
    own = place.positions(q.shape[1]) // block
    past = jnp.arange(means.shape[1], dtype="int32")[None] < own[:, None]
    seen = past[None] & same_document(place, block)[:, 0]
    total = jnp.where(seen[:, :, None], energy, 0).sum(axis=-1)
    return top_k(jax.lax.stop_gradient(total), routed)


def misa(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s 1 c"],
    *,
    weights: Float[Array, "b t h"],
    options: MISAOptions,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose keys by the scores of the routed heads; of candidates, by those of all.

    Raises:
        ValueError: if ``top`` or ``candidates`` exceed the number of keys.

    Source: Zhou et al. 2026, arXiv:2605.07363, abstract.
    """
    there = k.shape[1]
    top = place.budget("top", options.top, there, "keys")
    wide = options.candidates
    wide = top if wide is None else place.budget("candidates", wide, there, "keys")
    heads = routed_heads(
        q, k, weights=weights, routed=options.routed, block=options.block, place=place
    )
    few = jnp.take_along_axis(q, heads[..., None], axis=2)
    light = jnp.take_along_axis(weights, heads, axis=2)

    def pick(few: Array, light: Array, q: Array, weights: Array, *rows: Array) -> tuple:
        allowed = visible_keys(rows[0], there, place, *rows[1:])
        scores = index(few, k[:, :, 0], light)
        ids, count = best(scores[:, None], allowed[:, None], top=wide)
        ids, count = ids[:, 0], count[:, 0]
        if options.candidates is None:
            return ids, count
        batch = jnp.arange(len(k))[:, None, None]
        products = jnp.einsum("bthc,btkc->bthk", q, k[batch, ids][:, :, :, 0])
        scores = jnp.einsum("bth,bthk->btk", weights, nnx.relu(products))
        live = jnp.arange(wide)[None, None] < count[..., None]
        places, count = best(scores[:, None], live[:, None], top=top)
        return jnp.take_along_axis(ids, places[:, 0], axis=2), count[:, 0]

    size = CHUNK // (q.shape[0] * q.shape[2] * max(there, wide * k.shape[3]))
    ids, count = in_chunks(pick, size, few, light, q, weights, *place.rows(q))
    return tokens(ids, count, there, place)
