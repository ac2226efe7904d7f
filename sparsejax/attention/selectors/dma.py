"""Dynamic mask attention: values bias their keys and say which stay visible."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.attention.context import Context, Mixed, Place
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selection import best, in_chunks, visible_keys
from sparsejax.attention.selectors.plain import Mixer, Sizes, Work
from sparsejax.config import require
from sparsejax.typing import Array, Float

__all__ = ["DMA", "DMAOptions", "dma"]

CHUNK = 2**22  # scores held at once


@dataclass(frozen=True, kw_only=True)
class DMAOptions:
    """The budget of ``dma``."""

    top: int = 2048  # keys of a query and key head

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "must be at least 1")

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count chosen pairs, and what the biases cost."""
        del block_kv
        pairs = np.minimum(np.arange(1, tokens + 1), self.top).sum()
        width = sizes.kv_heads * sizes.head_width
        return Work(float(pairs), 2.0 * tokens * width * sizes.kv_heads)


def dma(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    *,
    bias: Float[Array, "b g s"],
    top: int,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose for every query, in each key head, the keys with the largest bias.

    Raises:
        ValueError: if ``top`` exceeds the number of keys.

    Source: Shi et al. 2025, arXiv:2508.02124, Eq. 7-9. Departure: of equal biases the
    later counts, so that a model begins with a sliding window.
    """
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    top = place.budget("top", top, s, "keys")

    def pick(*rows: Array) -> tuple:
        allowed = visible_keys(rows[0], s, place, *rows[1:])[:, None, :, ::-1]
        scores = jnp.broadcast_to(bias[:, :, None, ::-1], (b, g, *allowed.shape[2:]))
        ids, count = best(scores, allowed, top=top)
        return (s - 1 - ids).transpose(0, 2, 1, 3), count.mT

    ids, count = in_chunks(pick, CHUNK // (b * g * s), *place.rows(q))
    ids, count = (x.repeat(h // g, axis=2).swapaxes(1, 2) for x in (ids, count))
    return BlockMask.from_blocks(
        ids,
        count,
        q_len=t,
        kv_len=s,
        block_q=1,
        block_kv=1,
        q_offset=place.q_offset,
    )


class DMA(Mixer):
    """Attention whose keys carry a bias of their values, and survive by it.

    Source: Shi et al. 2025, arXiv:2508.02124, Eq. 5-9. Departure: the bias is ``scale *
    softplus(…)``, as the authors' later code has it for stability.
    """

    def __init__(self, config: Any, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        self.options = config.options
        _, _, g, c = sizes
        init = jax.random.normal(rngs.params(), (g, c, g)) * (g * c) ** -0.5
        self.step = nnx.Param(init, axes=f"g c {g}")
        self.scale = nnx.Param(jnp.zeros(g), axes="g")

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g c"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Bias the keys, and attend to the best."""
        del x
        wide = jnp.einsum("bsgc,gch->bhs", v, self.step[...].astype(v.dtype))
        wide = nnx.softplus(wide.astype("float32"))
        bias = self.scale[...][None, :, None] * wide

        def select(q: Array, k: Array, bias: Array, *, place: Place) -> BlockMask:
            return dma(q, k, bias=bias, top=self.options.top, place=place)

        return context.attend(q, k, v, select, bias, axes=("b g s",), bias=bias)
