"""Grouped matrix product: consecutive groups of rows, each with a weight of its own.

``grouped_matmul(x, w, group_sizes)`` multiplies the first ``group_sizes[0]`` rows by
``w[0]``, the next ``group_sizes[1]`` by ``w[1]``, and so on. Rows past the last group
give 0 and receive no gradient, whatever they hold; an empty group's weight receives
exactly 0. The work is proportional to the rows, not to rows times groups.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparsejax.config import choose
from sparsejax.late import late
from sparsejax.moe.grouped_xla import xla
from sparsejax.partition import platform
from sparsejax.typing import Array, Float, Int

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]


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
        group_sizes: rows of each group; their sum is at most the number of rows. Traced
            sizes cannot be refused: a negative one counts as 0, and what would lie past
            the rows is cut off.
        implementation: a name of ``IMPLEMENTATIONS``. None is "mosaic_tpu" on a TPU and
            "xla" otherwise; "mosaic_gpu" has to be named until it has met a GPU.

    Raises:
        ValueError: for an unknown implementation or one that cannot run, for shapes
            that do not fit, and for sizes that are negative or too many.
    """
    name = _default() if implementation is None else implementation
    choose("implementation", name, IMPLEMENTATIONS)
    _check(x, w, group_sizes)
    if 0 in (x.size, w.size):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return IMPLEMENTATIONS[name](x, w, _bounded(group_sizes, x.shape[0]))


def _default() -> str:
    return "mosaic_tpu" if platform() == "tpu" else "xla"


def _check(x: Array, w: Array, group_sizes: Array) -> None:
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
    if isinstance(group_sizes, Tracer):
        return
    sizes = np.asarray(group_sizes, np.int64)
    if (sizes < 0).any():
        at = int(sizes.argmin())
        raise ValueError(
            f"group_sizes[{at}]={sizes[at]}: a group has 0 rows or more; count rows"
            " with jnp.bincount(experts, length=groups)"
        )
    if sizes.sum() > x.shape[0]:
        raise ValueError(
            f"group_sizes add up to {sizes.sum()}: x has only {x.shape[0]} rows; count"
            " each row once, or drop rows first"
        )


def _bounded(group_sizes: Array, rows: int) -> Array:
    """Cut off what lies past the rows; a negative size counts as 0."""
    n = jnp.arange(group_sizes.shape[0])
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, rows)
    # A masked sum, not a scan: one small kernel on a GPU.
    before = jnp.where(n[None] < n[:, None], sizes[None], 0)
    starts = before.sum(axis=1, dtype=jnp.int32)
    overflows = before.sum(axis=1, dtype=jnp.float32) > 2 * rows
    left = jnp.where(overflows, 0, jnp.maximum(rows - starts, 0))
    return jnp.minimum(sizes, left)


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


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "reference": _reference,
    "xla": xla,
    "mosaic_tpu": late("sparsejax.moe.grouped_tpu", "mosaic_tpu"),
    "mosaic_gpu": late("sparsejax.moe.grouped_gpu", "mosaic_gpu"),
}
