"""Log-linear sparse attention: a choice from coarse to fine, and coarse keys beside it.

Symbols: level 0 is tokens, and one vector of level ``n + 1`` is the mean of ``block``
vectors of level ``n``. What a query's coarser self chose at level ``n + 1`` are blocks
of level ``n``, among which it chooses again.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention.attended import merge
from sparsejax.attention.context import Context, Mixed, Place, listed
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selection import products, region_means
from sparsejax.attention.selectors.plain import Mixer, Sizes, Work, everything
from sparsejax.config import require
from sparsejax.ranking import top_k
from sparsejax.typing import Array, Float, Int

__all__ = ["LLSA", "LLSAOptions", "llsa"]


@dataclass(frozen=True, kw_only=True)
class LLSAOptions:
    """Blocks of their own size, smaller than kernels like them."""

    block: int = 16  # vectors that become one of the next level
    top: int = 8  # blocks that a block reads, at every level
    levels: int | None = None  # none for as many as leave the coarsest a block or more
    enriched: bool = True  # whether coarse keys are read too

    def __post_init__(self) -> None:
        require(self.block >= 2, "block", self.block, "must be at least 2")
        require(self.top >= 1, "top", self.top, "must be at least 1")
        deep = self.levels is None or self.levels >= 1
        require(deep, "levels", self.levels, "must be at least 1, or none")

    def depth(self, tokens: int) -> int:
        """Number of coarse levels."""
        if self.levels is not None:
            return self.levels
        return max(1, int(math.log(tokens) / math.log(self.block) + 1e-9) - 1)

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count pairs with tokens and coarse keys, and the products of choosing."""
        del block_kv
        depth, step = self.depth(tokens), self.top * self.block
        coarsest = tokens / self.block**depth
        seen = [step] * (depth - 1) + [coarsest]  # candidates, level by level
        rows = [tokens / self.block ** (n + 1) for n in range(depth)]
        scored = sum(a * b for a, b in zip(seen, rows, strict=True))
        pairs = tokens * (min(step, tokens) + sum(seen) * self.enriched)
        return Work(float(pairs), 2.0 * sizes.heads * sizes.head_width * scored)


def llsa(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    *,
    options: LLSAOptions,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> list[BlockMask]:
    """Choose blocks from the coarsest level down, among what the level above left.

    Gives a mask for every level from that of tokens on: with queries of level 0 and
    blocks of that level's keys. The coarsest level, of which all is read, has none.

    Raises:
        ValueError: if the lengths are no multiples of the coarsest blocks, if ``top``
            exceeds the coarsest level, or for several documents.

    Source: Zhou et al. 2025, arXiv:2512.16615, Sec. 3.
    """
    _check(q, k, options, place)
    depth, block = options.depth(k.shape[1]), options.block
    levels = [(q, k)]
    for _ in range(depth):
        q_means, k_means = (region_means(x, block) for x in levels[-1])
        levels.append((q_means, k_means))
    there = levels[-1][1].shape[1]
    top = place.budget("top", options.top, there, "blocks of the coarsest level")
    masks, found = [], None
    for level in range(depth, 0, -1):
        coarse_q, coarse_k = levels[level]
        if found is None:
            scores = products(coarse_q, coarse_k)
            found = top_k(jax.lax.stop_gradient(scores), top)
        else:
            found = _narrowed(coarse_q, coarse_k, found, block, top)
        masks.append(
            BlockMask.from_blocks(
                found,
                jnp.full(found.shape[:3], top, "int32"),
                q_len=q.shape[1],
                kv_len=levels[level - 1][1].shape[1],
                block_q=block**level,
                block_kv=block,
            )
        )
    return masks[::-1]


def _narrowed(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    ids: Int[Array, "b h i k"],
    block: int,
    top: int,
) -> Int[Array, "b h t k"]:
    """Choose among the parts of what the queries' coarser selves chose."""
    b, _, h, _ = q.shape
    step = jnp.arange(block, dtype=ids.dtype)[None, None, None, None]
    parts = ids[..., None] * block + step
    parts = parts.reshape(b, h, ids.shape[2], -1).repeat(block, axis=2)
    head = jnp.arange(h)[None, :, None, None] // (h // k.shape[2])
    keys = k[jnp.arange(b)[:, None, None, None], parts, head]
    scores = jnp.einsum("bthc,bhtkc->bhtk", q, keys)
    best = top_k(jax.lax.stop_gradient(scores), top)
    return jnp.take_along_axis(parts, best, axis=-1)


def _check(q: Array, k: Array, options: LLSAOptions, place: Place) -> None:
    if place.segments is not None:
        raise ValueError("llsa reads all of one document; do not pack several")
    whole = options.block ** options.depth(k.shape[1])
    if q.shape[1] % whole or k.shape[1] % whole:
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys: llsa needs multiples of"
            f" {whole}, {options.block} to the {options.depth(k.shape[1])} levels"
        )


class LLSA(Mixer):
    """Attention to chosen tokens and to the coarse keys on the way to them.

    A coarse key counts as often as the tokens it is the mean of, and stays where those
    are read too. All is one softmax.

    Source: Zhou et al. 2025, arXiv:2512.16615, Sec. 3.
    """

    def __init__(self, config: Any, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        del sizes, rngs
        self.options = config.options

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g c"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend at every level and join the results."""
        del x
        sinks = None if context.sinks is None else "h"
        values, density = context.local(
            lambda *args: self._local(context, *args),
            *(q, k, v, context.sinks),
            axes=("b t h c", "b s g c", "b s g c", sinks),
            outputs=("b t h c", "b t h"),
        )
        return Mixed(values, {}, {"density": density.mean()})

    def _local(
        self, context: Context, place: Place, q: Array, k: Array, v: Array, sinks: Any
    ) -> tuple[Array, Array]:
        options = self.options
        masks = llsa(q, k, options=options, place=place)
        found = context.attended(q, k, v, masks[0], place, sinks=sinks)
        for level in range(1, len(masks) + 1) if options.enriched else ():
            k, v = (region_means(y, options.block).astype(q.dtype) for y in (k, v))
            if level < len(masks):
                mask = masks[level]
            else:
                mask = everything(context, q.shape[1], k.shape[1])
            part = context.attended(q, k, v, mask, place)
            weight = level * math.log(options.block)  # tokens in one coarse key
            found = merge(found, part._replace(lse=part.lse + weight))
        return found.values, listed(masks[0], q)
