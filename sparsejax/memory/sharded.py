"""Memories under a mesh: tokens are searched where they are, tables stay in place.

A device holds the rows of its place along ``tensor`` and the columns of its place along
``fsdp``. Ids and weights, which are small, are gathered along ``fsdp``; what a device
reads of its columns is exchanged for whole tokens. The table never travels, and its
gradient is added up over the batch once, after all tiles. Without an ambient mesh, or
where it does not divide the tokens, the slots and the width, the sums are those of
``tiles`` (which XLA then cuts as it sees fit: same values, more traffic).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax.memory import tiles
from sparsejax.partition import ACTIVATIONS, PARAMETERS
from sparsejax.typing import Array, Float, Int

__all__ = [
    "Cut",
    "add_rows",
    "ambient_cut",
    "multiply_rows",
    "parts",
    "per_token",
    "sum_rows",
]


class Cut(NamedTuple):
    """Mesh axes, those of size one left out."""

    tokens: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def run(self, function: Callable[..., Array], inputs: str, output: str) -> Callable:
        """Map letters to what each device holds.

        ``T`` is a table, ``S`` the tables of all layers, ``n`` are tokens, ``1`` is
        everywhere.
        """
        table = self.rows, self.columns
        specs = {"T": P(*table), "S": P(None, *table), "n": P(self.tokens), "1": P()}
        return jax.shard_map(
            function,
            in_specs=tuple(specs[letter] for letter in inputs),
            out_specs=specs[output],
            check_vma=True,
        )

    def gather(self, x: Array) -> Array:
        """Tokens of this device to tokens of its group along the columns."""
        return jax.lax.all_gather(x, self.columns, tiled=True) if self.columns else x

    def own(self, ids: Array, slots: int) -> Array:
        """Global ids to rows of this device; ``slots``, its row count, if elsewhere."""
        if not self.rows:
            return ids
        ids = ids - slots * jax.lax.axis_index(self.rows)
        return jnp.where((ids >= 0) & (ids < slots), ids, slots)

    def to_columns(self, x: Array) -> Array:
        """Whole tokens to the columns of the group's tokens."""
        if not self.columns:
            return x
        return jax.lax.all_to_all(x, self.columns, 1, 0, tiled=True)

    def to_tokens(self, x: Array) -> Array:
        """Columns of the group's tokens to whole tokens."""
        if not self.columns:
            return x
        return jax.lax.all_to_all(x, self.columns, 0, 1, tiled=True)


def _live(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the axes that the ambient mesh cuts along; none inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return ()
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def parts(axes: tuple[str, ...]) -> int:
    """Count the pieces that the ambient mesh cuts along these axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def ambient_cut(tokens: int, slots: int, width: int) -> Cut | None:
    """Say how the ambient mesh cuts; None without one, or where it does not divide."""
    cut = Cut(_live(ACTIVATIONS["n"]), _live(PARAMETERS["m"]), _live(PARAMETERS["d"]))
    sizes = zip((tokens, slots, width), cut, strict=True)
    fits = all(size % parts(axes) == 0 for size, axes in sizes)
    return cut if any(cut) and fits else None


def per_token(function: Callable[..., Array], *arrays: Float[Array, "h n r"]) -> Array:
    """Call a function of separate tokens and heads on each device's own.

    XLA would send all tokens to all devices to sort them. An axis that does not divide
    is not cut.
    """
    live = [_live(ACTIVATIONS[letter]) for letter in "hn"]
    if not any(live):
        return function(*arrays)
    sizes = zip(live, arrays[0].shape[:2], strict=True)
    spec = P(*(axes if size % parts(axes) == 0 else () for axes, size in sizes))
    specs = (spec,) * len(arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=spec)(*arrays)


def sum_rows(
    table: Float[Array, "*l m d"],
    ids: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "n d"]:
    """Sum the rows of every token, weighted; with ``layer``, those of one layer."""
    cut = ambient_cut(ids.shape[0], *table.shape[-2:])
    if cut is None:
        return tiles.sum_rows(*tiles.flat(table, ids, layer), weights)

    def local(table: Array, ids: Array, weights: Array, *layer: Array) -> Array:
        ids = cut.own(cut.gather(ids), table.shape[-2])
        table, ids = tiles.flat(table, ids, *layer or (None,))
        y = tiles.sum_rows(table, ids, cut.gather(weights))
        return cut.to_tokens(jax.lax.psum(y, cut.rows) if cut.rows else y)

    if layer is None:
        return cut.run(local, "Tnn", "n")(table, ids, weights)
    return cut.run(local, "Snn1", "n")(table, ids, weights, layer)


def multiply_rows(
    table: Float[Array, "*l m d"],
    ids: Int[Array, "n k"],
    x: Float[Array, "n d"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "n k"]:
    """Multiply every token with its rows; with ``layer``, those of one layer."""
    cut = ambient_cut(ids.shape[0], *table.shape[-2:])
    if cut is None:
        return tiles.multiply_rows(*tiles.flat(table, ids, layer), x)

    def local(table: Array, ids: Array, x: Array, *layer: Array) -> Array:
        ids = cut.own(cut.gather(ids), table.shape[-2])
        table, ids = tiles.flat(table, ids, *layer or (None,))
        y = tiles.multiply_rows(table, ids, cut.to_columns(x))
        y = jax.lax.psum(y, cut.rows) if cut.rows else y
        if not cut.columns:
            return y
        return jax.lax.psum_scatter(y, cut.columns, tiled=True)

    if layer is None:
        return cut.run(local, "Tnn", "n")(table, ids, x)
    return cut.run(local, "Snn1", "n")(table, ids, x, layer)


def add_rows(
    ids: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    x: Float[Array, "n d"],
    *,
    slots: int,
) -> Float[Array, "m d"]:
    """Add every token, weighted, to its rows of zeros."""
    cut = ambient_cut(ids.shape[0], slots, x.shape[1])
    if cut is None:
        return tiles.add_rows(ids, weights, x, slots=slots)
    others = tuple(axis for axis in cut.tokens if axis not in cut.columns)
    height = slots // parts(cut.rows)

    def local(ids: Array, weights: Array, x: Array) -> Array:
        ids, weights = cut.own(cut.gather(ids), height), cut.gather(weights)
        total = tiles.add_rows(ids, weights, cut.to_columns(x), slots=height)
        return jax.lax.psum(total, others) if others else total

    return cut.run(local, "nnn", "T")(ids, weights, x)
