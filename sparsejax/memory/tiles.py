"""Sums over the rows of a table, a tile of tokens at a time, on one device.

Three sums that are each other's gradients, for a table ``T``: ``sum_rows`` is
``sum_k w_nk T[id_nk]``, ``multiply_rows`` is ``T[id_nk] . x_n`` and ``add_rows`` adds
``w_nk x_n`` to row ``id_nk`` of zeros. All give float32. An id of ``m`` names no row:
it reads zeros and adds nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Float, Int

__all__ = ["add_rows", "flat", "multiply_rows", "sum_rows"]

# Elements of the table in flight: 4 MiB, about a core's share of cache. On CPU 2^18 to
# 2^20 are equally fast, and some 5 times faster than one gather of all tokens.
TILE = 2**20


def sum_rows(
    table: Float[Array, "m d"], ids: Int[Array, "n k"], weights: Float[Array, "n k"]
) -> Float[Array, "n d"]:
    """Sum the rows of every token, weighted."""

    def tile(ids: Array, weights: Array) -> Array:
        weights = weights.astype(jnp.float32)
        return jnp.einsum("nk,nkd->nd", weights, _rows(table, ids))

    return _map(tile, ids, weights, row=table.shape[1])


def multiply_rows(
    table: Float[Array, "m d"], ids: Int[Array, "n k"], x: Float[Array, "n d"]
) -> Float[Array, "n k"]:
    """Multiply every token with its rows."""

    def tile(ids: Array, x: Array) -> Array:
        return jnp.einsum("nd,nkd->nk", x.astype(jnp.float32), _rows(table, ids))

    return _map(tile, ids, x, row=table.shape[1])


def add_rows(
    ids: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    x: Float[Array, "n d"],
    *,
    slots: int,
) -> Float[Array, "m d"]:
    """Add every token, weighted, to its rows of zeros."""

    def tile(total: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
        ids, weights, x = piece
        added = weights[..., None] * x[:, None, :]
        return total.at[ids].add(added, mode="drop"), None

    weights, x = weights.astype(jnp.float32), x.astype(jnp.float32)
    pieces = _split(ids, weights, x, row=x.shape[1])
    zeros = jnp.zeros((slots, x.shape[1]), jnp.float32)
    return jax.lax.scan(tile, _vary_with(zeros, *pieces), pieces)[0]


def flat(
    table: Float[Array, "*l m d"], ids: Int[Array, "n k"], layer: Int[Array, ""] | None
) -> tuple[Float[Array, "q d"], Int[Array, "n k"]]:
    """See the rows of all layers as one table, and ids of one layer as ids of that."""
    if layer is None:
        return table, ids
    layers, slots, width = table.shape
    exists = (ids >= 0) & (ids < slots)
    ids = jnp.where(exists, ids + layer * slots, layers * slots)
    return table.reshape(layers * slots, width), ids


def _rows(table: Array, ids: Array) -> Array:
    return table.at[ids].get(mode="fill", fill_value=0).astype(jnp.float32)


def _vary_with(x: Array, *others: Array) -> Array:
    """Under ``shard_map``, let ``x`` differ between devices where the others do."""
    varying = (jax.typeof(other).manual_axis_type.varying for other in others)
    axes = frozenset().union(*varying)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def _split(ids: Array, *others: Array, row: int) -> tuple[Array, ...]:
    """Cut ``[n, ...]`` into ``[tiles, n / tiles, ...]``, padded with zeros.

    A tile takes every ``tiles``-th token, so that tokens cut over a mesh stay where
    they are.
    """
    tokens, k = ids.shape
    height = -(-tokens // max(1, -(-tokens * k * row // TILE)))
    tiles = max(1, -(-tokens // max(1, height)))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, height * tiles - tokens), (0, 0)))
        return x.reshape(height, tiles, x.shape[1]).swapaxes(0, 1)

    return tuple(cut(x) for x in (ids, *others))


def _map(
    function: Callable[..., Array], ids: Array, other: Array, *, row: int
) -> Array:
    pieces = _split(ids, other, row=row)
    y = jax.lax.map(lambda piece: function(*piece), pieces)
    tiles, height, width = y.shape
    return y.swapaxes(0, 1).reshape(tiles * height, width)[: ids.shape[0]]
