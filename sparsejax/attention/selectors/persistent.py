"""Persistent memory: learned keys and values that every query sees, whatever else."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention.attended import merge
from sparsejax.attention.context import Context, Mixed, Place
from sparsejax.attention.selectors.plain import (
    Mixer,
    Sizes,
    Work,
    everything,
    pattern_mask,
)
from sparsejax.config import require
from sparsejax.typing import Array, Float

__all__ = ["PersistentMemory", "PersistentMemoryOptions"]


@dataclass(frozen=True, kw_only=True)
class PersistentMemoryOptions:
    """How much is remembered; the pattern says what is read of the text."""

    slots: int = 1024  # learned keys and values of every key head

    def __post_init__(self) -> None:
        require(self.slots >= 1, "slots", self.slots, "must be at least 1")

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count the pairs with the memory, which come on top of the pattern's."""
        del block_kv, sizes
        return Work(float(tokens * self.slots), 0.0)


class PersistentMemory(Mixer):
    """Attention over the config's pattern and the memory, in one softmax.

    Source: Sukhbaatar et al. 2019, arXiv:1907.01470, Eq. 9-10. Departure: the
    feed-forward layer stays unless the model leaves it out; grouped heads share memory.
    """

    def __init__(self, config: Any, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        slots = config.options.slots
        _, _, g, c = sizes
        # Kept small and scaled at use, as the paper has it.
        keys = jax.random.normal(rngs.params(), (slots, g, c)) * c**-0.5
        values = jax.random.normal(rngs.params(), (slots, g, c)) * slots**-0.5
        self.keys = nnx.Param(keys, axes=f"{slots} g c")
        self.values = nnx.Param(values, axes=f"{slots} g c")

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g c"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend to text and memory, and join the two."""
        del x
        slots, _, c = self.keys.shape
        memory = [
            (scale**0.5 * p[...]).astype(q.dtype)
            for scale, p in ((c, self.keys), (slots, self.values))
        ]
        mask = pattern_mask(context, q.shape[1], k.shape[1])

        def local(place: Place, q: Array, *rest: Any) -> Array:
            k, v, keys, values, mask, sinks = rest
            t = q.shape[1]
            offset = jnp.asarray(place.q_offset, "int32")
            mask = mask.replace(q_len=t, q_offset=offset)
            text = context.attended(q, k, v, mask, place, sinks=sinks)
            both = [
                jnp.broadcast_to(x[None], (len(q), *x.shape)) for x in (keys, values)
            ]
            every = everything(context, t, slots)
            known = context.attended(q, both[0], both[1], every, Place())
            return merge(text, known).values

        letters = "b t h c", "b s g c", "b s g c", "m g c", "m g c", mask.axes()
        values = context.local(
            local,
            *(q, k, v, *memory, mask, context.sinks),
            axes=(*letters, None if context.sinks is None else "h"),
            outputs="b t h c",
        )
        return Mixed(values, {}, {})
