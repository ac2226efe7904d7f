"""Dead units: slices of weights that hold nothing, and weights without them.

A unit is an index of one of a parameter's axes, told by its letter: a hidden channel is
an ``f``, a head an ``h``. Axes that stack layers and experts stay: each of those has
units of its own, but all keep equally many, or they would not stack.
"""

import jax.numpy as jnp

from sparsejax.masked.plan import depth
from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["kept", "silent", "without"]


def silent(
    weight: Float[Array, "*shape"], axes: str, letter: str
) -> Bool[Array, "*stack units"]:
    """Tell which units are exactly 0 throughout.

    >>> silent(jnp.array([[1.0, 0.0], [2.0, 0.0]]), "d f", "f").tolist()
    [False, True]
    """
    letters = axes.split()
    stays = {*range(depth(letters)), letters.index(letter)}
    rest = tuple(i for i in range(weight.ndim) if i not in stays)
    return jnp.all(weight == 0, axis=rest)


def kept(live: Bool[Array, "*stack units"], count: int) -> Int[Array, "*stack kept"]:
    """Give the indices of so many units in order: the live ones, then dead ones.

    >>> kept(jnp.array([[True, False, True], [False, True, False]]), 2).tolist()
    [[0, 2], [0, 1]]
    """
    first = jnp.argsort(~live, axis=-1, stable=True)[..., :count]
    return jnp.sort(first, axis=-1).astype(jnp.int32)


def without(
    weight: Float[Array, "*shape"],
    axes: str,
    letter: str,
    ids: Int[Array, "*stack kept"],
) -> Float[Array, "*kept"]:
    """Take only the units of those indices."""
    letters = axes.split()
    shape = [1] * weight.ndim
    shape[: depth(letters)] = weight.shape[: depth(letters)]
    shape[letters.index(letter)] = ids.shape[-1]
    return jnp.take_along_axis(weight, ids.reshape(shape), letters.index(letter))
