"""What holds inside a tile: scores in base 2, and which elements are visible."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.skeleton import Piece
from pallas_kernels.gpu.tiles import MATRIX, load, spread

__all__ = ["Rule", "Score"]

LOG2E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Score:
    """From a product of query and key to a logit."""

    scale: float  # positive
    softcap: float | None = None
    biased: bool = False  # whether something is added to the capped logits

    @property
    def unit(self) -> float:
        """What turns ``logits`` into logits of base 2.

        Left out where nothing stands between the product and the exponential: there,
        the softmax's subtraction takes the factor for free.
        """
        free = self.softcap is None and not self.biased
        return self.scale * LOG2E if free else 1.0

    def logits(self, s: jax.Array, *bias: jax.Array) -> tuple[jax.Array, Any]:
        """Give logits of ``unit`` and, of a softcap, the tanh: its slope is 1 - tanh^2.

        Args:
            s: products.
            bias: what to add if ``biased``, of the same shape and in base 2.
        """
        tanh = None
        if self.softcap is not None:
            # Not jnp.tanh: the device's own errs by 5e-4, times the cap.
            grown = jnp.exp2(s * (2 * self.scale * LOG2E / self.softcap))
            tanh = 1.0 - 2.0 / (grown + 1.0)
            s = tanh * (self.softcap * LOG2E)
        elif self.biased:
            s = s * (self.scale * LOG2E)
        return sum(bias, s), tanh


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The element rule: its static part here, the rest in arrays of these names.

    offset: int32 "1", absolute position of the first query.
    choice: int32 "h", which pattern a head follows.
    elements: int8 "b h t s", or "b h s t" for key gradients; b and h may be 1.
    q_segments, kv_segments: int32 "b t", "b s"; equal nonzero numbers see each other.
    grants: int8 "b h j t", which queries may read a listed block; b and h may be 1.
    """

    kv_len: int
    kv_block: int  # keys of a block that ``grants`` speaks of
    patterns: tuple[Callable[[Any, Any], Any], ...] = ()
    fold: int | None = None  # query rows repeat after so many: heads, one below another

    def visible(
        self, piece: Piece, q_start: Any, kv_start: Any, shape: Any, *, queries: int
    ) -> jax.Array:
        """Which elements of a tile are visible; its queries lie along ``queries``."""
        own, keys = piece.own, 1 - queries
        refs = own.refs

        def positions(axis: int, start: Any) -> jax.Array:
            return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX) + start

        def along(name: str, *at: Any, axis: int, start: Any) -> jax.Array:
            ref = refs[name].at[(*at, pl.ds(start, shape[axis]))]
            layout = MATRIX.reduce(1 - axis)
            return spread(load(ref, layout, optimized=False), shape, axis)

        j = positions(keys, kv_start)
        allowed = j < self.kv_len
        if self.patterns:
            i = positions(queries, q_start)
            i = refs["offset"][0] + (
                i if self.fold is None else lax.rem(i, jnp.int32(self.fold))
            )
            chosen = refs["choice"][own.head] if "choice" in refs else 0
            allowed = allowed & _chosen(self.patterns, chosen, i, j)
        if "elements" in refs:
            ref = refs["elements"]
            starts = (q_start, kv_start) if queries == 0 else (kv_start, q_start)
            spans = [pl.ds(s, n) for s, n in zip(starts, shape, strict=True)]
            at = own.of_batch(ref.shape[0]), own.of_head(ref.shape[1])
            # int8: a tile of booleans does not compile.
            tile = load(ref.at[(*at, *spans)], MATRIX, optimized=False)
            allowed = allowed & (tile != 0)
        if "q_segments" in refs:
            mine = along("q_segments", own.batch, axis=queries, start=q_start)
            other = along("kv_segments", own.batch, axis=keys, start=kv_start)
            allowed = allowed & (mine == other) & (mine != 0)
        if "grants" in refs:
            ref = refs["grants"]
            at = own.of_batch(ref.shape[0]), own.of_head(ref.shape[1])
            block = lax.div(kv_start, jnp.int32(self.kv_block))
            given = along("grants", *at, block, axis=queries, start=q_start)
            allowed = allowed & (given != 0)
        return allowed


def _chosen(patterns: Any, chosen: Any, i: jax.Array, j: jax.Array) -> jax.Array:
    if len(patterns) == 1:
        return patterns[0](i, j)
    # Booleans do not leave a branch on the device.
    branches = [lambda p=p: p(i, j).astype(jnp.int32) for p in patterns]
    return lax.switch(chosen, branches) != 0
