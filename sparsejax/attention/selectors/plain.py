"""What methods share: how configs know them, a mixer's rules, and a pattern's mixer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.attention.context import Context, Mixed, Place, check_whole
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.patterns import full
from sparsejax.partition import axis
from sparsejax.typing import Array, Float, Int

__all__ = ["Method", "Mixer", "Patterned", "Sizes", "Stretch", "Work"]


class Sizes(NamedTuple):
    """What a mixer's parameters are sized by."""

    width: int
    heads: int
    kv_heads: int
    head_width: int


class Work(NamedTuple):
    """What a method does for one sequence."""

    pairs: float  # queries and keys that meet in the softmax, of one head
    choosing: float  # FLOPs of scores that carry no gradient, of all heads


class Method(NamedTuple):
    """A selector as configs know it.

    Its options are a frozen dataclass of the arguments, with the paper's defaults and
    with checks; ``work(tokens, block_kv, sizes) -> Work`` says what they cost.
    """

    options: type
    build: Callable[..., Any]  # (config, sizes, *, rngs) -> mixer
    causal: bool = True  # False if queries read their future
    patterned: bool = False  # whether it reads what the config's pattern lets it
    latent: bool = False  # whether it chooses alike by keys that all heads share


class Stretch(NamedTuple):
    """Stretches of keys: stretch ``m`` is ``length`` keys from ``m * stride`` on."""

    length: int
    stride: int

    def number(self, keys: int) -> int:
        """How many there are of so many keys, whole ones."""
        return max(0, (keys - self.length) // self.stride + 1)


class Mixer(nnx.Module):
    """A mixer that needs nothing of earlier tokens besides keys and values."""

    def stretch(self, keys: int) -> Stretch:
        """What one summary stands for, where there is room for so many keys."""
        return Stretch(keys, keys)

    def summaries(
        self, k: Float[Array, "b s g c"], features: dict[str, Array]
    ) -> dict[str, Array]:
        """Make nothing of stretches."""
        del k, features
        return {}

    def features(
        self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]
    ) -> dict[str, Array]:
        """Keep nothing."""
        del x, positions
        return {}


class Patterned(Mixer):
    """The mixer of a fixed pattern."""

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g _"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend as the config's pattern says."""
        del x
        mask = pattern_mask(context, q.shape[1], k.shape[1])
        if isinstance(mask.count, np.ndarray):  # known while it compiles, like its work

            def known(q: Array, k: Array, *, place: Place) -> BlockMask:
                del q, k
                return mask.replace(q_offset=jnp.asarray(place.q_offset, "int32"))

            return context.attend(q, k, v, known)._replace(metrics={})

        def local(q: Array, k: Array, mask: BlockMask, *, place: Place) -> BlockMask:
            del k
            offset = jnp.asarray(place.q_offset, "int32")
            return mask.replace(q_len=q.shape[1], q_offset=offset)

        mixed = context.attend(q, k, v, local, mask, axes=(mask.axes(),))
        return mixed._replace(metrics={})


def everything(context: Context, t: int, s: int) -> BlockMask:
    """The mask that hides nothing."""
    config = context.config
    sizes = {"block_q": min(config.block_q, t), "block_kv": min(config.block_kv, s)}
    return BlockMask.from_pattern(full(), q_len=t, kv_len=s, **sizes)


def pattern_mask(context: Context, t: int, s: int) -> BlockMask:
    """The config's mask, which has to fall into whole blocks for every device.

    Its tables are numpy's where they are known and nobody cuts them.

    Raises:
        ValueError: if the queries do not.
    """
    config = context.config
    block_q = min(config.block_q, t)
    check_whole(t, block_q, "block_q")
    mask = BlockMask.from_pattern(
        config.build(),
        q_len=t,
        kv_len=s,
        block_q=block_q,
        block_kv=min(config.block_kv, s),
        q_offset=context.q_offset,
    )
    by_head = axis("tensor") is not None and mask.ids.shape[1] > 1
    cut = axis("context") is not None or by_head
    return jax.tree.map(jnp.asarray, mask) if cut else mask
