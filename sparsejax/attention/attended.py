"""What goes into and comes out of attention besides arrays of heads."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsejax.typing import Array, Float, Int

__all__ = ["Attended", "Segments", "join_sinks", "merge"]


class Attended(NamedTuple):
    """Values and the logarithm of their softmax denominator."""

    values: Float[Array, "b t h c"]
    lse: Float[Array, "b h t"]  # -inf, with values 0, where nothing is visible

    def named(self) -> "Attended":
        """The same, by the name under which rematerialisation may keep it."""
        return Attended(*(checkpoint_name(x, "attended") for x in self))


class Segments(NamedTuple):
    """Documents packed into one sequence: equal nonzero numbers see each other."""

    q: Int[Array, "b t"]
    kv: Int[Array, "b s"]


def join_sinks(attended: Attended, sinks: Float[Array, " h"]) -> Attended:
    """Let one more logit per head, with value zero, join a finished softmax."""
    lse = jnp.logaddexp(attended.lse, sinks.astype(attended.lse.dtype)[None, :, None])
    values = attended.values
    return Attended((values * _share(attended, lse)).astype(values.dtype), lse)


def _share(part: Attended, lse: Float[Array, "b h t"]) -> Float[Array, "b t h 1"]:
    """What a part counts for in a softmax over more; 0 where nothing is seen at all."""
    seen = jnp.isfinite(lse)
    share = jnp.where(seen, jnp.exp(part.lse - jnp.where(seen, lse, 0)), 0)
    return share.mT[..., None]


def merge(a: Attended, b: Attended) -> Attended:
    """Give what one softmax over the keys of both would give; they share no key."""
    lse = jnp.logaddexp(a.lse, b.lse)
    values = sum(_share(x, lse) * x.values.astype("float32") for x in (a, b))
    return Attended(jnp.asarray(values).astype(a.values.dtype), lse)
