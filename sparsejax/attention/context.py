"""What a mixer is given besides its arrays, and how it computes on any mesh.

A mixer is called as ``mixer(q, k, v, x, context) -> Mixed``: rotated queries "b t h c"
of these tokens, keys and values "b s g c" of all tokens so far, and what the layer was
given, "b t d". These are global arrays. What it computes with heads and blocks it hands
to ``context.attend`` or ``context.local``, which run it on each device's piece: batch
and heads are cut as the mesh asks, queries stay where they are along the mesh axis
``context``, and keys are gathered; ``Place`` says where the queries stand. What later
tokens need of earlier ones besides keys and values it gives as ``features(x,
positions)``, a dict of arrays "b t …"; ``context.features`` has them for all tokens.
What it makes of stretches of keys, of ``length`` each and ``stride`` apart as its
``stretch`` says, it gives as ``summaries(k, features)``, "b m …"; in front of a cache
they are kept, and ``context.summaries`` has those of all stretches that are complete.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.operation import (
    block_sparse_attention_and_lse,
    takes_lists,
)
from sparsejax.partition import axis, per_shard
from sparsejax.typing import Array, Float, Int

__all__ = ["Context", "Mixed", "Place"]


class Mixed(NamedTuple):
    """What a mixer returns: one value for each query and head, and what it says."""

    values: Float[Array, "b t h c"]
    losses: dict[str, Float[Array, ""]]  # already weighted
    metrics: dict[str, Array]


class Place(NamedTuple):
    """Where queries stand among the keys."""

    q_offset: Any = 0  # absolute position of the first query
    segments: Segments | None = None
    cached: bool = False  # keys may be fewer than a budget
    tensor: str | None = None  # mesh axis over which heads are cut

    def over_heads(self, x: Array) -> Array:
        """Add up what each device summed over its own heads."""
        return x if self.tensor is None else jax.lax.psum(x, self.tensor)

    def positions(self, tokens: int) -> Int[Array, " t"]:
        """Absolute positions of the queries."""
        return self.q_offset + jnp.arange(tokens, dtype="int32")

    def rows(self, q: Array) -> tuple[Array, ...]:
        """Positions of the queries "b t" and, of packed documents, their numbers."""
        i = jnp.broadcast_to(self.positions(q.shape[1])[None], q.shape[:2])
        return (i,) if self.segments is None else (i, self.segments.q)

    def budget(self, name: str, value: int, there: int, what: str) -> int:
        """How many to choose; what a short cache does not hold needs no choosing.

        Raises:
            ValueError: if the budget exceeds what is there, outside a cache.
        """
        if value > there and not self.cached:
            raise ValueError(
                f"selection.{name}={value}: there are only {there} {what}; choose at"
                f" most {there}, or smaller blocks"
            )
        return min(value, there)


class Context(NamedTuple):
    """What holds for one call of a layer."""

    config: Any  # the layer's AttentionConfig
    positions: Int[Array, "b t"]  # what a rotation sees
    sinks: Float[Array, " h"] | None = None
    segments: Segments | None = None
    q_offset: Any = 0
    features: dict[str, Array] = {}  # noqa: RUF012  what the mixer asked to keep, "b s …"
    summaries: dict[str, Array] = {}  # noqa: RUF012  of stretches, if there is a cache
    cached: bool = False
    scale: float | None = None  # of the products; None for the keys' width ** -0.5
    keys: str = "b s g c"  # axes of keys and values; "b s 1 c" if heads share them

    def local(
        self, function: Callable[..., Any], *arrays: Any, axes: tuple, outputs: Any
    ) -> Any:
        """Run ``function(place, *arrays)`` on each device's piece.

        Args:
            arrays: queries "b t …" first, the others with whatever axes.
            axes: axes strings of the arrays, or trees of them.
            outputs: axes strings of what is returned, likewise.
        """
        parts, tensor = parts_of_context(), axis("tensor")
        known = isinstance(self.q_offset, int) and parts == 1  # then lists are narrow

        def run(q_offset: Any, segments: Any, *arrays: Any) -> Any:
            if parts > 1:
                q_offset = q_offset + jax.lax.axis_index("context") * arrays[0].shape[1]
            segments = None if segments is None else Segments(*segments)
            q_offset = self.q_offset if known else q_offset
            place = Place(q_offset, segments, self.cached, tensor)
            return function(place, *arrays)

        numbers = None if self.segments is None else tuple(self.segments)
        inputs = "", (None if numbers is None else ("b t", "b s")), *axes
        given = jnp.asarray(self.q_offset, "int32"), numbers, *arrays
        return per_shard(run, inputs=inputs, outputs=outputs)(*given)

    def attend(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g _"],
        select: Callable[..., BlockMask],
        *extras: Any,
        axes: tuple = (),
        bias: Float[Array, "b g s"] | None = None,
    ) -> Mixed:
        """Attend where ``select(q, k, *extras, place=…)`` lets each query.

        Metrics: ``density``, the listed blocks over all blocks.
        """

        def run(place: Place, q: Array, k: Array, v: Array, *rest: Any) -> Any:
            sinks, bias, *extras = rest
            mask = select(q, k, *extras, place=place)
            attended = self.attended(q, k, v, mask, place, sinks=sinks, bias=bias)
            return attended.values, listed(mask, q)

        optional = zip((self.sinks, bias), ("h", "b g s"), strict=True)
        optional = tuple(None if x is None else letters for x, letters in optional)
        values, density = self.local(
            run,
            *(q, k, v, self.sinks, bias, *extras),
            axes=("b t h c", self.keys, self.keys, *optional, *axes),
            outputs=("b t h c", "b t h"),
        )
        return Mixed(values, {}, {"density": density.mean()})

    def attended(
        self, q: Array, k: Array, v: Array, mask: BlockMask, place: Place, **extras: Any
    ) -> Attended:
        """Attend under a mask on this device's piece, as the config says."""
        config = self.config
        if mask.block_q < config.block_q and not takes_lists(config.implementation):
            block_q, block_kv = min(config.block_q, mask.q_len), config.block_kv
            mask = mask.coarsened(block_q, block_kv=max(block_kv, mask.block_kv))
        return block_sparse_attention_and_lse(
            q,
            k,
            v,
            mask,
            scale=self.scale,
            softcap=config.softcap,
            segments=place.segments,
            implementation=config.implementation,
            **extras,
        )


def listed(mask: BlockMask, q: Float[Array, "b t h c"]) -> Float[Array, "b t h"]:
    """Share of the key blocks that each query's list names."""
    share = jnp.asarray(mask.count).astype("float32") / mask.grid.columns
    share = share.repeat(mask.block_q, axis=2)[:, :, : mask.q_len]
    return jnp.broadcast_to(share.mT, q.shape[:3])


def check_whole(tokens: int, width: int, name: str) -> None:
    """Raise ``ValueError`` unless all devices along the sequence get whole blocks."""
    parts = parts_of_context()
    if parts > 1 and tokens % (parts * width):
        raise ValueError(
            f"{tokens} tokens in blocks of {width} do not divide over {parts} context"
            f" devices; choose {name} so that each gets whole blocks"
        )


def parts_of_context() -> int:
    """Number of devices along the sequence."""
    if axis("context") is None:
        return 1
    return jax.sharding.get_abstract_mesh().shape["context"]
