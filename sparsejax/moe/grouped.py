"""Grouped matrix product: consecutive groups of rows, each with a weight of its own.

``grouped_matmul(x, w, group_sizes)`` multiplies the first ``group_sizes[0]`` rows by
``w[0]``, the next ``group_sizes[1]`` by ``w[1]``, and so on. Rows past the last group
give 0 and receive no gradient, whatever they hold; an empty group's weight receives
exactly 0. The work is proportional to the rows, not to rows times groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.config import near
from sparsejax.typing import Array, Float, Int

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]

# A group is cut in tiles of the first size, its rest in tiles of the second: wide tiles
# run at the speed of a dense product, narrow ones waste few rows on a small group.
TILES = (256, 32)


def grouped_matmul(
    x: Float[Array, "m d"],
    w: Float[Array, "e d f"],
    group_sizes: Int[Array, " e"],
    *,
    implementation: str | None = None,
) -> Float[Array, "m f"]:
    """Multiply each group of rows by its own matrix, accumulating in float32.

    Args:
        x: rows sorted by group.
        w: one matrix for each group, of the dtype of ``x``.
        group_sizes: rows of each group; their sum is at most the number of rows.
        implementation: a name of ``IMPLEMENTATIONS``; None picks by platform.

    Raises:
        ValueError: for an unknown implementation or shapes that do not fit.
    """
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={name!r}: grouped_matmul has no such implementation"
            f"{near(name, IMPLEMENTATIONS)}"
        )
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"group_sizes of shape {group_sizes.shape}: must have one entry for each"
            f" of the {w.shape[0]} matrices in w"
        )
    if x.shape[1:] != w.shape[1:2] or x.dtype != w.dtype:
        raise ValueError(
            f"x {x.dtype}{x.shape} and w {w.dtype}{w.shape}: the width and the dtype"
            " must agree; cast the weights to x.dtype"
        )
    return IMPLEMENTATIONS[name](x, w, group_sizes.astype(jnp.int32))


def _reference(x: Array, w: Array, group_sizes: Array) -> Array:
    """One masked product for each group, summed."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    y = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    for g in range(w.shape[0]):
        live = ((row >= ends[g] - group_sizes[g]) & (row < ends[g]))[:, None]
        part = jnp.where(live, x, 0).astype(jnp.float32) @ w[g].astype(jnp.float32)
        y += jnp.where(live, part, 0)
    return y.astype(x.dtype)


def _xla(x: Array, w: Array, group_sizes: Array) -> Array:
    if 0 in (x.size, w.size):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return _product(*_alike(x, w, group_sizes))


def _alike(*arrays: Array) -> tuple[Array, ...]:
    """Mark all arrays as varying over every mesh axis that one of them varies over."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    union = frozenset().union(*varying)
    return tuple(
        lax.pcast(a, tuple(union - mine), to="varying")
        for a, mine in zip(arrays, varying, strict=True)
    )


@jax.custom_vjp
def _product(x: Array, w: Array, group_sizes: Array) -> Array:
    return _rows_by_weights(x, w, group_sizes, contract=0)


def _product_forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, Any]:
    return _product(x, w, group_sizes), (x, w, group_sizes)


def _product_backward(residuals: Any, dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    dx = _rows_by_weights(dy, w, group_sizes, contract=1)
    return dx, _rows_by_rows(x, dy, group_sizes), None


_product.defvjp(_product_forward, _product_backward)


def _rows_by_weights(x: Array, w: Array, group_sizes: Array, *, contract: int) -> Array:
    """Multiply rows by their group's weight, contracting that axis of the weight."""
    ends = jnp.cumsum(group_sizes)

    def group(g: Array, y: Array) -> Array:
        weight = lax.dynamic_index_in_dim(w, g, keepdims=False)

        def tile(start: Array, live: Array, y: Array) -> Array:
            size = live.shape[0]
            rows = lax.dynamic_slice_in_dim(x, start, size)
            part = _dot(rows, weight, 1, contract).astype(x.dtype)
            part = jnp.where(live, part, lax.dynamic_slice_in_dim(y, start, size))
            return lax.dynamic_update_slice_in_dim(y, part, start, 0)

        return _over_tiles(tile, ends[g] - group_sizes[g], ends[g], x.shape[0], y)

    y = jnp.zeros_like(x, shape=(x.shape[0], w.shape[2 - contract]))
    return lax.fori_loop(0, w.shape[0], group, y)


def _rows_by_rows(x: Array, dy: Array, group_sizes: Array) -> Array:
    """Give ``x.T @ dy`` of each group; zeros for an empty one."""
    ends = jnp.cumsum(group_sizes)

    def group(g: Array) -> Array:
        def tile(start: Array, live: Array, total: Array) -> Array:
            rows, rows_dy = (
                jnp.where(live, lax.dynamic_slice_in_dim(a, start, live.shape[0]), 0)
                for a in (x, dy)
            )
            return total + _dot(rows, rows_dy, 0, 0)

        shape = (x.shape[1], dy.shape[1])
        total = jnp.zeros_like(x, shape=shape, dtype=jnp.float32)
        start = ends[g] - group_sizes[g]
        return _over_tiles(tile, start, ends[g], x.shape[0], total).astype(x.dtype)

    return lax.map(group, jnp.arange(group_sizes.shape[0]))


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _over_tiles(
    tile: Callable[..., Array], start: Array, end: Array, rows: int, carry: Array
) -> Array:
    """Fold ``tile(first_row, live, carry)`` over the rows from ``start`` to ``end``.

    Every row of the group is live in exactly one tile. A last tile may reach past its
    group, or begin before it where it would reach past the array: those rows are dead.
    """
    for size in TILES:
        size = min(size, rows)  # noqa: PLW2901
        count = (end - start) // size
        if size == min(TILES[-1], rows):
            count = (end - start + size - 1) // size

        def step(i: Array, carry: Array, size: int = size, start: Array = start):
            wanted = start + i * size
            first = jnp.minimum(wanted, rows - size)
            row = first + lax.iota(jnp.int32, size)
            live = (row >= wanted) & (row < end)
            return tile(first, live[:, None], carry)

        carry = lax.fori_loop(0, count, step, carry)
        start = start + count * size
    return carry


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "reference": _reference,
    "xla": _xla,
}
