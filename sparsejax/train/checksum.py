"""Checksums of arrays, computed on the devices that hold them.

``checksum`` maps one array, sharded in any way over any mesh, to one ``uint32`` that
depends on nothing but its bits and their positions. Every element is mixed with its
position by a bijection and the results are added modulo 2**32, which is associative:
the sum of the shards is the sum of the whole, to the bit. A single changed element
always changes the sum; anything else escapes with a chance of 2**-32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped, UInt32

from sparsejax import tree
from sparsejax.typing import Array, PyTree

__all__ = ["checksum", "checksums"]


def checksums(state: PyTree) -> dict[str, int]:
    """Checksum every array of a tree, by path; every process gets the same numbers.

    Raises:
        TypeError: for a leaf that is not a ``jax.Array``, naming its path.
    """
    for path, leaf in tree.leaves(state).items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(
                f"{path}: a checksum needs a jax.Array, got {type(leaf).__name__};"
                " wrap it in jnp.asarray"
            )
    # All sums are dispatched before the first is waited for.
    sums = {path: checksum(leaf) for path, leaf in tree.leaves(state).items()}
    return {path: int(s) for path, s in jax.device_get(sums).items()}


@jax.jit
def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Add up all elements of any dtype, each mixed with its position.

    The mixing is the finaliser of MurmurHash3, a bijection of 32-bit words in which
    every bit of the input moves about half the bits of the output.
    """
    words = _words(x)
    mixed = _mix(words ^ _mix(_positions(words.shape)))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _words(x: Array) -> UInt32[Array, "..."]:
    """Reinterpret the bits of every element as one word, or as two on a last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _words(jax.random.key_data(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(jnp.stack([x.real, x.imag], axis=-1))
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        x = jax.lax.bitcast_convert_type(x, bits)
    return x.astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Row-major index of every element, modulo 2**32."""
    stride = 1
    index: Any = jnp.zeros(shape, jnp.uint32)
    for axis in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        index += step * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    return index


def _mix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> jnp.uint32(16))
