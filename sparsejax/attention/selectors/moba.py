"""Mixture of block attention: a query reads its own block and the best earlier ones."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.attention.context import Context, Mixed, Place
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selection import (
    block_means,
    choose,
    products,
    same_document,
)
from sparsejax.attention.selectors.plain import Mixer, Sizes, Stretch, Work
from sparsejax.config import require
from sparsejax.typing import Array, Float

__all__ = ["MoBA", "MoBAOptions", "moba"]


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
    means: Float[Array, "b m g c"] | None = None,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose for every query and head its own block, and the earlier blocks whose mean
    key has the largest product with the query.

    Args:
        means: of the blocks that are complete, where they are known.

    Raises:
        ValueError: if ``top`` exceeds the number of blocks.

    Source: Lu et al. 2025, arXiv:2502.13189, Eq. 2-6. Departure: documents packed in
    one row do not see each other's keys in the means.
    """
    columns = -(-k.shape[1] // block_kv)
    if means is None:
        means = block_means(k, block_kv, place)
    means = jnp.pad(means, [(0, 0), (0, columns - means.shape[1]), (0, 0), (0, 0)])
    scores = products(q, means)
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


class MoBA(Mixer):
    """The mixer of ``moba``: in front of a cache it keeps the means of its blocks."""

    def __init__(self, config: Any, sizes: Sizes, *, rngs: Any) -> None:
        del sizes, rngs
        self.options, self.block_kv = config.options, config.block_kv

    def stretch(self, keys: int) -> Stretch:
        """Give a block."""
        block = min(self.block_kv, keys)
        return Stretch(block, block)

    def summaries(
        self, k: Float[Array, "b s g c"], features: dict[str, Array]
    ) -> dict[str, Array]:
        """Give the mean of each whole block."""
        del features
        block = self.stretch(k.shape[1]).length
        whole = k.shape[1] // block * block
        return {"means": block_means(k[:, :whole], block, Place())}

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g _"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend to the blocks chosen by the means that are kept, or by new ones."""
        del x
        block, top = self.stretch(k.shape[1]).length, self.options.top

        def select(q: Array, k: Array, *means: Array, place: Place) -> BlockMask:
            (known,) = means or (None,)
            return moba(q, k, block_kv=block, top=top, means=known, place=place)

        means = tuple(context.summaries.values())
        return context.attend(
            q, k, v, select, *means, axes=(context.keys,) * len(means)
        )
