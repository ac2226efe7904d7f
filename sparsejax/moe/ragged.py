"""Rows between devices, as many as there are: XLA's collective, or its emulation.

``sizes[i, j]`` rows go from device ``i`` to device ``j``; every device knows the whole
table. They leave in the order of their destinations and arrive in that of their
origins. The way back, and the gradient, is the transposed table. XLA has the collective
for TPU and GPU; elsewhere all rows are gathered everywhere, which is as right and
moves more.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.partition import platform
from sparsejax.typing import Array, Float, Int

__all__ = ["grants", "moved", "moved_ids"]

NATIVE = ("tpu", "gpu")


def grants(wanted: Int[Array, "n m"], rows: int) -> Int[Array, "n m"]:
    """Cut a table of sizes to what receivers with ``rows`` rows have room for.

    Every sender may fill an equal share; what others leave free goes in their order.
    """
    shares = jnp.minimum(wanted, rows // wanted.shape[0])
    more = wanted - shares
    before = jnp.cumsum(more, axis=0) - more
    free = rows - shares.sum(axis=0, keepdims=True) - before
    return shares + jnp.clip(free, 0, more)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def moved(
    x: Float[Array, "m d"], sizes: Int[Array, "e e"], axis: str, rows: int
) -> Float[Array, "q d"]:
    """Move rows along ``axis``; rows that nobody sends are 0 and send no gradient.

    Args:
        x: this device's rows, the first destination's first; what is past them stays.
        sizes: rows from each device to each, the same table everywhere.
        axis: the mesh axis.
        rows: of the result; enough for all that arrives here.
    """
    return _moved(x, sizes, axis, rows)


def _moved_forward(x: Array, sizes: Array, axis: str, rows: int) -> tuple[Array, Any]:
    return _moved(x, sizes, axis, rows), (
        sizes,
        jnp.zeros_like(x, shape=(x.shape[0], 0)),
    )


def _moved_backward(
    axis: str, rows: int, residuals: Any, dy: Array
) -> tuple[Array, None]:
    del rows
    sizes, like = residuals
    return _moved(dy, sizes.T, axis, like.shape[0]), None


moved.defvjp(_moved_forward, _moved_backward)


def moved_ids(
    ids: Int[Array, " m"], sizes: Int[Array, "e e"], axis: str, rows: int, fill: int
) -> Int[Array, " q"]:
    """Move integers like ``moved``; where nobody sends one there is ``fill``."""
    arrived = sizes[:, lax.axis_index(axis)].sum()
    live = jnp.arange(rows, dtype=sizes.dtype) < arrived
    return jnp.where(live, _moved(ids, sizes, axis, rows), fill)


def _moved(x: Array, sizes: Array, axis: str, rows: int) -> Array:
    move = _by_collective if platform() in NATIVE else _by_gathering
    return move(x, sizes, axis, rows)


def _by_collective(x: Array, sizes: Array, axis: str, rows: int) -> Array:
    me = lax.axis_index(axis)
    leave = (jnp.cumsum(sizes, axis=1) - sizes)[me]
    land = (jnp.cumsum(sizes, axis=0) - sizes)[me]
    room = jnp.zeros_like(x, shape=(rows, *x.shape[1:]))
    return lax.ragged_all_to_all(
        x, room, leave, sizes[me], land, sizes[:, me], axis_name=axis
    )


def _by_gathering(x: Array, sizes: Array, axis: str, rows: int) -> Array:
    me = lax.axis_index(axis)
    everyone = lax.all_gather(x, axis, tiled=True)
    coming = sizes[:, me]
    ends = jnp.cumsum(coming)
    place = jnp.arange(rows, dtype=sizes.dtype)
    origin = jnp.searchsorted(ends, place, side="right").astype(sizes.dtype)
    origin = jnp.minimum(origin, sizes.shape[0] - 1)
    first = (jnp.cumsum(sizes, axis=1) - sizes)[:, me] - (ends - coming)
    source = origin * x.shape[0] + first[origin] + place
    source = jnp.where(place < ends[-1], source, everyone.shape[0])
    return everyone.at[source].get(mode="fill", fill_value=0)
