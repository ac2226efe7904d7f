"""Bags: a table, and for every token the ids of the few rows it touches.

``embedding_bag`` sums rows, ``row_products`` multiplies with them; each is half of the
other's gradient. Neither holds more than a tile of tokens times ``k`` rows, forward or
backward, and under a mesh no device holds more than its piece of the table. Products
accumulate in float32; a row that occurs twice counts twice; rows that no id names get a
gradient of exactly zero. Ids outside ``[0, m)`` are refused where they are known, and
read NaN where they are traced.

In the place of the table's array there may be a ``Table``: read alike, its gradient
leaves as rows, never as an array of the table's shape.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparsejax.memory.sharded import add_rows, multiply_rows, sum_rows
from sparsejax.memory.table import Table
from sparsejax.typing import Array, Float, Int

__all__ = ["embedding_bag", "row_products"]


def embedding_bag(
    table: Float[Array, "m d"] | Table,
    ids: Int[Array, "n k"],
    weights: Float[Array, "n k"],
) -> Float[Array, "n d"]:
    """Sum the rows ``ids`` of the table, weighted: ``y_n = sum_k w_nk table[id_nk]``.

    The result has the table's dtype.

    Raises:
        ValueError: if ids and weights are not of one shape ``(n, k)``, or known ids
            name no row.
    """
    if ids.ndim != 2 or ids.shape != weights.shape:
        raise ValueError(
            f"ids of shape {ids.shape} and weights of shape {weights.shape}: must both"
            " be (n, k); merge heads and slots first"
        )
    _check_ids(table, ids)
    return _bag(table, ids, weights)


def row_products(
    table: Float[Array, "m d"] | Table,
    ids: Int[Array, "n k"],
    x: Float[Array, "n d"],
) -> Float[Array, "n k"]:
    """Multiply every token with its rows: ``y_nk = table[id_nk] . x_n``.

    The result has the dtype of ``x``.

    Raises:
        ValueError: if ids and ``x`` do not have the same tokens, or known ids name no
            row.
    """
    if ids.ndim != 2 or x.shape != (ids.shape[0], table.shape[1]):
        raise ValueError(
            f"ids of shape {ids.shape} and x of shape {x.shape}: must be (n, k) and"
            f" (n, {table.shape[1]})"
        )
    _check_ids(table, ids)
    return _products(table, ids, x)


def _check_ids(table: Array | Table, ids: Array) -> None:
    """Refuse ids that are known to name no row; others give NaN."""
    if isinstance(ids, Tracer) or not ids.size:
        return
    known, rows = np.asarray(ids), table.shape[0]
    low, high = known.min(), known.max()
    if low < 0 or high >= rows:
        raise ValueError(
            f"ids from {low} to {high}: the table has the rows 0..{rows - 1}"
        )


def _exists(table: Array | Table, ids: Array) -> Array:
    return (ids >= 0) & (ids < table.shape[0])


def _sum(table: Array | Table, ids: Array, weights: Array) -> Array:
    weights = jnp.where(_exists(table, ids), weights, jnp.nan)
    if isinstance(table, Table):
        y = table.scaled(sum_rows(table.rows, ids, weights, table.layer))
    else:
        y = sum_rows(table, ids, weights)
    return y.astype(table.dtype)


def _multiply(table: Array | Table, ids: Array, x: Array) -> Array:
    if isinstance(table, Table):
        y = table.scaled(multiply_rows(table.rows, ids, x, table.layer))
    else:
        y = multiply_rows(table, ids, x)
    return jnp.where(_exists(table, ids), y, jnp.nan).astype(x.dtype)


def _add(table: Array | Table, ids: Array, weights: Array, x: Array) -> Array | Table:
    if isinstance(table, Table):
        return table.receive(ids, weights, x)
    ids = jnp.where(_exists(table, ids), ids, table.shape[0])  # -1 would be the last
    return add_rows(ids, weights, x, slots=table.shape[0]).astype(table.dtype)


_bag = jax.custom_vjp(_sum)
_products = jax.custom_vjp(_multiply)


def _forward(function: Callable[..., Array]) -> Callable[..., Any]:
    return lambda *operands: (function(*operands), operands)


def _bag_backward(operands: tuple[Any, Array, Array], y_bar: Array) -> Any:
    table, ids, weights = operands
    weights_bar = _multiply(table, ids, y_bar).astype(weights.dtype)
    return _add(table, ids, weights, y_bar), None, weights_bar


def _products_backward(operands: tuple[Any, Array, Array], y_bar: Array) -> Any:
    table, ids, x = operands
    x_bar = _sum(table, ids, y_bar).astype(x.dtype)
    return _add(table, ids, y_bar, x), None, x_bar


_bag.defvjp(_forward(_sum), _bag_backward)
_products.defvjp(_forward(_multiply), _products_backward)
