"""Mixture of block attention: a query reads its own block and the best earlier ones."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from sparsejax.attention.context import Place
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selection import (
    block_means,
    choose,
    products,
    same_document,
)
from sparsejax.attention.selectors.plain import Sizes, Work
from sparsejax.config import require
from sparsejax.typing import Array, Float

__all__ = ["MoBAOptions", "moba"]


@dataclass(frozen=True, kw_only=True)
class MoBAOptions:
    """Arguments of ``moba``; the blocks are the layer's ``block_kv``."""

    top: int = 3  # blocks of a query, its own included

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "must be at least 1, the own block")

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count pairs and the products with the means of earlier blocks."""
        own, place = np.divmod(np.arange(tokens), block_kv)
        pairs = np.minimum(own, self.top - 1) * block_kv + place + 1
        choosing = 2 * sizes.heads * sizes.head_width * own.sum()
        return Work(float(pairs.sum()), float(choosing))


def moba(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    *,
    block_kv: int,
    top: int,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose for every query and head its own block, and the earlier blocks whose mean
    key has the largest product with the query.

    Raises:
        ValueError: if ``top`` exceeds the number of blocks.

    Source: Lu et al. 2025, arXiv:2502.13189, Eq. 2-6. Departure: documents packed in
    one row do not see each other's keys in the means.
    """
    scores = products(q, block_means(k, block_kv, place))
    own = (place.positions(q.shape[1]) // block_kv)[None, None, :, None]
    block = jnp.arange(scores.shape[-1], dtype="int32")[None, None, None]
    past = (block < own) & same_document(place, block_kv)
    return choose(
        scores,
        past | (block == own),
        forced=block == own,
        top=place.budget("top", top, scores.shape[-1], "blocks"),
        kv_len=k.shape[1],
        block_kv=block_kv,
        place=place,
    )
