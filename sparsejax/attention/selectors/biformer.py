"""Bi-level routing: regions choose regions, and their tokens read each other."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention.context import Context, Mixed, Place, check_whole
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selection import best, region_means
from sparsejax.attention.selectors.plain import Mixer, Sizes, Work
from sparsejax.config import require
from sparsejax.typing import Array, Float

__all__ = ["BiFormer", "BiFormerOptions", "biformer"]


@dataclass(frozen=True, kw_only=True)
class BiFormerOptions:
    """Regions are the layer's ``block_kv`` consecutive tokens."""

    top: int = 4  # regions that a region reads
    taps: int = 5  # of the convolution over values, odd

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "must be at least 1")
        odd = self.taps > 0 and self.taps % 2 == 1
        require(odd, "taps", self.taps, "must be odd and positive")

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count pairs, and the products of regions."""
        regions = -(-tokens // block_kv)
        pairs = tokens * min(self.top, regions) * block_kv
        return Work(pairs, 2.0 * sizes.heads * sizes.head_width * regions**2)


def biformer(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    *,
    block_kv: int,
    top: int,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose for every region of queries, in all heads alike, the regions of keys whose
    mean has the largest product with its own.

    Raises:
        ValueError: if ``top`` exceeds the number of regions, or for several documents.

    Source: Zhu et al. 2023, arXiv:2303.08810, Eq. 3-4. Departure: regions are stretches
    of a sequence; an image's tokens come region by region.
    """
    if place.segments is not None:
        raise ValueError("biformer reads all of one document; do not pack several")
    ours, theirs = region_means(q, block_kv), region_means(k, block_kv)
    theirs = theirs.repeat(q.shape[2] // k.shape[2], axis=2)
    scores = place.over_heads(jnp.einsum("bihc,bjhc->bij", ours, theirs))[:, None]
    top = place.budget("top", top, scores.shape[-1], "regions")
    ids, count = best(scores, jnp.ones((1, 1, *scores.shape[2:]), bool), top=top)
    return BlockMask.from_blocks(
        ids,
        count,
        q_len=q.shape[1],
        kv_len=k.shape[1],
        block_q=block_kv,
        block_kv=block_kv,
        q_offset=place.q_offset,
    )


class BiFormer(Mixer):
    """Attention among chosen regions, plus a convolution over values.

    Source: Zhu et al. 2023, arXiv:2303.08810, Eq. 6. Departure: the convolution runs
    along the sequence.
    """

    def __init__(self, config: Any, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        self.options = config.options
        _, _, g, c = sizes
        taps = self.options.taps
        init = jax.random.normal(rngs.params(), (taps, g, c)) * taps**-0.5
        self.taps = nnx.Param(init, axes=f"{taps} g c")

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g c"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend, and add what the convolution sees around each token."""
        del x
        block_kv = min(context.config.block_kv, k.shape[1])
        check_whole(q.shape[1], block_kv, "block_kv")
        select = functools.partial(biformer, block_kv=block_kv, top=self.options.top)
        mixed = context.attend(q, k, v, select)
        edge = self.options.taps // 2
        line = jnp.pad(v, [(0, 0), (edge, edge), (0, 0), (0, 0)])
        taps = self.taps[...].astype(v.dtype)
        near = sum(
            line[:, n : n + v.shape[1]] * taps[None, None, n]
            for n in range(self.options.taps)
        )
        near = jnp.asarray(near).repeat(q.shape[2] // k.shape[2], axis=2)
        return mixed._replace(values=mixed.values + near)
