"""Row-sparse optimisers: only the rows that a step has touched are read and written.

A rule is ``(gradient, moments, about, **arguments) -> (direction, moments)`` on some
rows; the table then moves by minus the rate times the direction. Moments start at zero.
Against the dense optimisers of the same name:

- ``sgd`` and ``adagrad`` are equal always: a gradient of zero moves nothing;
- ``adam`` has equal moments whenever a row is touched, those of the steps between
  decayed exactly; it is equal when every row is touched, and otherwise leaves out the
  drift of a row that rests, which its old mean would cause;
- decoupled weight decay is exact for all: every row, read or not, is the stored one
  times one scalar, and that scalar decays.

Momentum, Lion, Muon and Adafactor have no rule: they move rows that nobody touches.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsejax.memory import sharded
from sparsejax.memory.rows import Rows, tile_height
from sparsejax.typing import Array, Float, Int

__all__ = ["MOMENTS", "RULES", "Move", "apply", "moments_of"]

Moments = dict[str, Array]


class Move(NamedTuple):
    """How far an update goes."""

    step: Int[Array, ""]  # of this update, from 1
    rate: Float[Array, ""]  # what the direction is multiplied with
    factor: Float[Array, ""]  # what the gradient is multiplied with: clipping


def sgd(
    gradient: Float[Array, "u d"], moments: Moments, step: Int[Array, ""]
) -> tuple[Float[Array, "u d"], Moments]:
    """Go where the gradient points."""
    del step
    return gradient, moments


def adagrad(
    gradient: Float[Array, "u d"],
    moments: Moments,
    step: Int[Array, ""],
    *,
    initial: float = 0.1,
    eps: float = 1e-7,
) -> tuple[Float[Array, "u d"], Moments]:
    """Divide by the root of all squares so far, to which ``initial`` is added."""
    del step
    square = moments["square"] + gradient * gradient
    return gradient * jax.lax.rsqrt(initial + square + eps), {"square": square}


def adam(
    gradient: Float[Array, "u d"],
    moments: Moments,
    step: Int[Array, ""],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Float[Array, "u d"], Moments]:
    """Divide the mean by the root mean square, both decayed since the last touch."""
    since = (step - moments["last"]).astype(jnp.float32)
    mean = b1**since * moments["mean"] + (1 - b1) * gradient
    square = b2**since * moments["square"] + (1 - b2) * gradient * gradient
    count = step.astype(jnp.float32)
    corrected = jnp.sqrt(square / (1 - b2**count))
    direction = mean / (1 - b1**count) / (corrected + eps)
    # What is written hangs on what is read, or XLA would copy the column for each tile.
    last = jnp.maximum(moments["last"], step)
    return direction, {"mean": mean, "square": square, "last": last}


RULES: Mapping[str, Callable[..., tuple[Array, Moments]]] = {
    "sgd": sgd,
    "adagrad": adagrad,
    "adam": adam,
}
# What a rule keeps for every row; ``last``, the step of the last touch, is one integer.
MOMENTS: Mapping[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("square",),
    "adam": ("mean", "square", "last"),
}


def moments_of(rule: str, table: nnx.Variable) -> dict[str, nnx.Variable]:
    """Start a rule's moments, cut over a mesh like the table they belong to."""
    rows, axes = table.get_value(), table.axes

    def start(name: str) -> nnx.Variable:
        if name != "last":
            return nnx.Variable(jnp.zeros_like(rows), axes=axes)
        count = jnp.zeros((*rows.shape[:-1], 1), jnp.int32)
        return nnx.Variable(count, axes=f"{axes.rpartition(' ')[0]} 1")

    return {name: start(name) for name in MOMENTS[rule]}


def apply(
    rule: Callable[..., tuple[Array, Moments]],
    table: Float[Array, "*l m d"],
    moments: Moments,
    rows: Rows,
    move: Move,
) -> tuple[Float[Array, "*l m d"], Moments, Float[Array, ""]]:
    """Move the touched rows of a table and its moments, in place if they are donated.

    Returns:
        The table, the moments, and the sum of squares of what was added, over the rate.
    """
    cut = sharded.ambient_cut(0, *table.shape[-2:])
    if cut is None:
        return _apply(rule, table, moments, rows, move)
    lead = (None,) * (table.ndim - 2)
    place = P(*lead, cut.rows, cut.columns)
    places = {k: place if k != "last" else P(*lead, cut.rows) for k in moments}
    row = Rows._make([P(cut.rows), P(cut.rows, cut.columns)])
    axes = (*cut.rows, *cut.columns)

    def local(
        table: Array, moments: Moments, rows: Rows, move: Move
    ) -> tuple[Array, Moments, Array]:
        table, moments, square = _apply(rule, table, moments, rows, move)
        return table, moments, jax.lax.psum(square, axes) if axes else square

    return jax.shard_map(
        local,
        in_specs=(place, places, row, Move._make([P()] * 3)),
        out_specs=(place, places, P()),
    )(table, moments, rows, move)


def _apply(
    rule: Callable[..., tuple[Array, Moments]],
    table: Array,
    moments: Moments,
    rows: Rows,
    move: Move,
) -> tuple[Array, Moments, Array]:
    """Walk over tiles of the rows that there are; the padding costs nothing."""
    flat = {"table": table, **moments}
    shapes = {name: x.shape for name, x in flat.items()}
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in flat.items()}
    height = tile_height(*rows.values.shape)
    slots = flat["table"].shape[0]
    used = jnp.sum(rows.ids < slots, dtype=jnp.int32)

    def tile(index: Array, carry: Any) -> Any:
        flat, square = carry
        ids, gradient = (
            jax.lax.dynamic_slice_in_dim(x, index * height, height) for x in rows
        )
        where = {"indices_are_sorted": True, "unique_indices": True}
        read = {
            name: x.at[ids].get(mode="fill", fill_value=0, **where)
            for name, x in flat.items()
        }
        old = read.pop("table")
        direction, new = rule(gradient * move.factor, read, move.step)
        new = {"table": old - move.rate * direction, **new}
        flat = {
            name: x.at[ids].set(new[name], mode="drop", **where)
            for name, x in flat.items()
        }
        return flat, square + jnp.sum(direction * direction)

    nothing = jnp.sum(rows.values[:0])
    flat, square = jax.lax.fori_loop(0, -(-used // height), tile, (flat, nothing))
    flat = {name: x.reshape(shapes[name]) for name, x in flat.items()}
    return flat.pop("table"), flat, square
