"""The best few of a row, in passes over it: for rows of some tens, as of experts."""

from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Float, Int

__all__ = ["best", "top_k"]

FEW, SHORT = 8, 128  # choices and columns up to which passes are the faster way


def best(scores: Float[Array, "*rows n"], k: int) -> Int[Array, "*rows k"]:
    """Give the places of the ``k`` largest of each row, as ``lax.top_k`` does.

    A pass for every choice, which stays on a row's own device: XLA gathers all rows on
    every device to run its top-k, but not to run reductions.

    >>> best(jnp.array([[1.0, 3.0, 2.0, 3.0]]), 3).tolist()
    [[1, 3, 2]]
    """
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)

    def first(taken: Array) -> Array:
        largest = jnp.where(taken, -jnp.inf, scores).max(axis=-1, keepdims=True)
        tied = ~taken & (scores == largest)
        last = scores.shape[-1] - 1
        return jnp.where(tied, place, last).min(axis=-1, keepdims=True)

    def step(taken: Array, _: None) -> tuple[Array, Array]:
        found = first(taken)
        return taken | (place == found), found[..., 0]

    nothing = jnp.zeros_like(scores, dtype=bool)
    if k > FEW:
        found = jax.lax.scan(step, nothing, length=k)[1]
        return jnp.moveaxis(found, 0, -1)
    chosen: list[Array] = []
    for _ in range(k):
        # Made anew from what was found: then XLA need not write down what is taken.
        chosen.append(first(reduce(or_, [place == x for x in chosen], nothing)))
    return jnp.concatenate(chosen, axis=-1)


def top_k(scores: Float[Array, "*rows n"], k: int) -> Int[Array, "*rows k"]:
    """Give the places of the ``k`` largest of each row, the faster way for its length.

    On a CPU passes take a quarter of the time of ``lax.top_k`` for rows of 64, and
    longer for rows of 256.
    """
    if k <= FEW and scores.shape[-1] <= SHORT:
        return best(scores, k)
    return jax.lax.top_k(scores, k)[1].astype(jnp.int32)
