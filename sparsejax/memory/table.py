"""Tables whose gradient leaves as rows: a stand-in for the array of a parameter.

A ``Table`` takes the place of a table of values in a layer: bags read it like an array,
but nothing flows back into it. What would be added to its rows, the ids, weights and
vectors of ``row[id_nk] += w_nk * vector_n``, comes out as the gradient of its ``sink``,
which is otherwise never read. That is exact, works through scans, checkpoints and
shared tables, and costs what the tokens cost, whatever the number of rows.

A parameter says ``reads=k`` in its metadata if a token reads ``k`` of its rows in one
bag, and nothing else of it, in every layer that has it; ``readers=r`` if ``r`` layers
share it. A second bag would add its ids to those of the first.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.typing import Array, Float, Int, PyTree

__all__ = ["Reads", "Sink", "Table", "arm", "is_table", "join", "part", "sink_of"]

HALF = 2**16  # float32 holds ids below 2**31 only in halves


class Sink(NamedTuple):
    """Zeros in the shape of a layer's reads; their gradient is what they were."""

    high: Float[Array, "*l n k"]  # ids, in two parts: integers have no gradient
    low: Float[Array, "*l n k"]
    weights: Float[Array, "*l n k"]
    vectors: Float[Array, "*l n d"]


class Reads(NamedTuple):
    """All that rows of a table receive: ``weights_nk vectors_n`` goes to ``id_nk``."""

    ids: Int[Array, "n k"]  # layer * m + row
    weights: Float[Array, "n k"]
    vectors: Float[Array, "n d"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "scale", "layer", "sink"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class Table:
    """Rows of ``l`` layers, of which ``layer`` is read, and where its reads go."""

    rows: Any  # [l m d]; None while a scan is on its way
    scale: Any  # what every row is multiplied with, or None
    layer: Any  # which of l; a scan's has all of them
    sink: Any  # a Sink, or None if nobody asks for the gradient

    def __getitem__(self, index: Any) -> "Table":
        """Give itself for ``table[...]``, as a parameter's value is asked for."""
        if index is not Ellipsis:
            raise TypeError(f"table[{index!r}]: rows are read by bags; use table[...]")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one layer."""
        return self.rows.shape[-2:]

    @property
    def dtype(self) -> Any:
        """The dtype of the rows."""
        return self.rows.dtype

    def read_by(self, reader: Any) -> "Table":
        """Give the table to one of the layers that share it."""
        pick = partial(jax.lax.dynamic_index_in_dim, index=reader, keepdims=False)
        return replace(self, sink=jax.tree.map(pick, self.sink))

    def scaled(self, x: Array) -> Array:
        """Multiply what was read with the scale of all rows."""
        return x if self.scale is None else x * self.scale

    def receive(self, ids: Array, weights: Array, vectors: Array) -> "Table":
        """Give the cotangent that tells the sink what would have been added."""
        if self.sink is None:
            return Table(None, None, None, None)
        wide = ids.astype(jnp.int32)
        parts = wide // HALF, wide % HALF, weights, vectors
        told = Sink(*(x.astype(jnp.float32) for x in parts))
        return Table(None, None, None, told)


def is_table(variable: nnx.Variable) -> bool:
    """Whether a parameter is read by rows only."""
    return "reads" in variable.get_metadata()


def sink_of(variable: nnx.Variable, tokens: int) -> Sink:
    """Make the sink of a parameter, for that many tokens."""
    *layers, _, width = variable.get_value().shape
    about = variable.get_metadata()
    lead = (about["readers"],) if "readers" in about else tuple(layers)
    shapes = [(*lead, tokens, about["reads"])] * 3 + [(*lead, tokens, width)]
    return Sink(*(jnp.zeros(shape) for shape in shapes))


def arm(
    variable: nnx.Variable, sink: Sink | None, scale: Float[Array, ""] | None = None
) -> nnx.Variable:
    """Put a ``Table`` in the place of a parameter's value."""
    rows = variable.get_value()
    if rows.ndim == 3:
        return variable.replace(Table(rows, scale, jnp.arange(rows.shape[0]), sink))
    return variable.replace(Table(rows[None], scale, jnp.zeros((), jnp.int32), sink))


def reads(variable: nnx.Variable, told: Sink) -> Reads:
    """Read the gradient of a parameter's sink; more leading axes are micro-batches."""
    slots = variable.get_value().shape[-2]
    ids = told.high.astype(jnp.int32) * HALF + told.low.astype(jnp.int32)
    outside = (ids < 0) | (ids >= slots)
    total = slots
    if variable.get_value().ndim == 3:
        layers = variable.get_value().shape[0]
        total = slots * layers
        shape = (1,) * (ids.ndim - 3) + (layers, 1, 1)
        ids = ids + slots * jnp.arange(layers, dtype=jnp.int32).reshape(shape)
    ids = jnp.where(outside, total, ids)
    flat = (x.reshape(-1, x.shape[-1]) for x in (ids, told.weights, told.vectors))
    return Reads(*flat)


def _tables(x: Any) -> bool:
    return isinstance(x, Table)


def part(tree: PyTree) -> tuple[PyTree, list[tuple[Array, Any]]]:
    """Take the rows out of all tables: a scan would copy those of each layer."""
    found = [x for x in jax.tree.leaves(tree, is_leaf=_tables) if _tables(x)]
    rest = jax.tree.map(
        lambda x: replace(x, rows=None, scale=None) if _tables(x) else x,
        tree,
        is_leaf=_tables,
    )
    return rest, [(x.rows, x.scale) for x in found]


def join(tree: PyTree, held: list[tuple[Array, Any]]) -> PyTree:
    """Put the rows back into the tables of a tree, in order."""
    waiting = iter(held)

    def one(x: Any) -> Any:
        if not _tables(x):
            return x
        rows, scale = next(waiting)
        return replace(x, rows=rows, scale=scale)

    return jax.tree.map(one, tree, is_leaf=_tables)
