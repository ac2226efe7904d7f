"""A weight of which only whole blocks are stored, and the product with it.

``block_sparse_matmul(x, w)`` multiplies rows by the matrix that ``w.to_dense()`` is,
and its work follows the live blocks. What is not live is never read: NaN in columns of
``x`` that no live block meets spreads nowhere, and a column of the weight without a
live block gives 0, as does the gradient of inputs that no live block reads. The
weight's gradient is that of its live blocks; no other is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparsejax.config import choose
from sparsejax.late import late
from sparsejax.masked.block_sparse_xla import xla
from sparsejax.partition import platform
from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["IMPLEMENTATIONS", "BlockSparse", "block_sparse_matmul"]

Ids = Int[Array, " live"] | Int[np.ndarray, " live"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockSparse:
    """Live blocks of a matrix "d f", in any order, and where each of them is.

    Ids may be traced. An entry whose row or column is negative is not live: its values
    are never read. Blocks that reach past the matrix are filled up with zeros.

    >>> w = jnp.arange(1.0, 17).reshape(4, 4)
    >>> live = jnp.array([[True, False], [False, False]])
    >>> BlockSparse.from_dense(w, live)
    BlockSparse(4 x 4, 1 of 4 blocks of 2 x 2)
    >>> BlockSparse.from_dense(w, live).to_dense()[1].tolist()
    [5.0, 6.0, 0.0, 0.0]
    """

    values: Float[Array, "live tall wide"]
    rows: Ids  # of blocks
    columns: Ids
    shape: tuple[int, int]

    @classmethod
    def from_dense(
        cls,
        w: Float[Array, "d f"],
        live: Bool[Array, "_ _"] | Bool[np.ndarray, "_ _"],
        *,
        block: tuple[int, int] | None = None,
        capacity: int | None = None,
    ) -> "BlockSparse":
        """Take the live blocks of a dense matrix, column by column.

        Args:
            w: any matrix.
            live: which of its blocks are.
            block: sides of a block; by default the matrix is cut evenly.
            capacity: number of entries; by default as many as are live. A traced mask
                needs one, and blocks past it are left out.

        Raises:
            ValueError: if the mask does not fit the blocks, or has more than the
                capacity.
        """
        sides = block or _over(w.shape, live.shape)
        grid = _over(w.shape, sides)
        if live.shape != grid:
            raise ValueError(
                f"live of shape {live.shape}: a matrix of {w.shape} has {grid} blocks"
                f" of {sides}; give one truth value for each"
            )
        count = _capacity(live, capacity)
        columns, rows = jnp.nonzero(jnp.asarray(live).T, size=count, fill_value=-1)
        each = zip(w.shape, grid, sides, strict=True)
        ends = [(0, m * side - n) for n, m, side in each]
        cut = jnp.pad(w, ends).reshape(grid[0], sides[0], grid[1], sides[1])
        values = cut.swapaxes(1, 2)[rows, columns]
        values = jnp.where((rows >= 0)[:, None, None], values, 0)
        ids = rows.astype("int32"), columns.astype("int32")
        return cls(values, *ids, (w.shape[0], w.shape[1]))

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks the matrix is cut into."""
        return _over(self.shape, self.values.shape[1:])

    def density(self) -> float:
        """Give the live share of all blocks, for ids that are known.

        Raises:
            ValueError: for traced ids.
        """
        if _traced(self.rows, self.columns):
            raise ValueError("density() of traced ids: ask outside of jax.jit")
        return self._live() / (self.grid[0] * self.grid[1])

    def to_dense(self) -> Float[Array, "d f"]:
        """Write the matrix out; blocks of one place add up."""
        grid, (tall, wide) = self.grid, self.values.shape[1:]
        dead = (self.rows < 0) | (self.columns < 0)
        at = jnp.where(dead, grid[0], self.rows), self.columns
        zeros = jnp.zeros((*grid, tall, wide), self.values.dtype)
        cut = zeros.at[at].add(self.values, mode="drop").swapaxes(1, 2)
        return cut.reshape(grid[0] * tall, -1)[: self.shape[0], : self.shape[1]]

    def _live(self) -> int:
        ids = np.asarray(self.rows), np.asarray(self.columns)
        return int(((ids[0] >= 0) & (ids[1] >= 0)).sum())

    def __repr__(self) -> str:
        if not isinstance(self.values, jax.Array):
            return "BlockSparse(...)"
        known = not _traced(self.rows, self.columns)
        count = self._live() if known else f"up to {len(self.values)}"
        (rows, columns), (tall, wide) = self.grid, self.values.shape[1:]
        return (
            f"BlockSparse({self.shape[0]} x {self.shape[1]}, {count} of"
            f" {rows * columns} blocks of {tall} x {wide})"
        )


def _over(sizes: tuple[int, ...], by: tuple[int, ...]) -> tuple[int, int]:
    """Divide and round up."""
    rows, columns = (-(-n // m) for n, m in zip(sizes, by, strict=True))
    return rows, columns


def _flatten(w: BlockSparse) -> tuple[Any, Any]:
    names = [f.name for f in fields(w)][:-1]
    keys = map(jax.tree_util.GetAttrKey, names)
    return [(k, getattr(w, n)) for k, n in zip(keys, names, strict=True)], w.shape


def _unflatten(shape: Any, leaves: Any) -> BlockSparse:
    # Not through __init__: JAX also builds trees of specs, axes and placeholders.
    w = object.__new__(BlockSparse)
    for field, value in zip(fields(w), (*leaves, shape), strict=True):
        object.__setattr__(w, field.name, value)
    return w


jax.tree_util.register_pytree_with_keys(BlockSparse, _flatten, _unflatten)


def block_sparse_matmul(
    x: Float[Array, "n d"], w: BlockSparse, *, implementation: str | None = None
) -> Float[Array, "n f"]:
    """Multiply rows by a weight of live blocks, accumulating in float32.

    Under a mesh this is for one device's rows; ``shard_map`` over rows sums the
    gradient of a weight that all devices have.

    Args:
        x: rows.
        w: of the dtype of ``x``. Traced ids cannot be refused: those outside of the
            matrix count as not live.
        implementation: a name of ``IMPLEMENTATIONS``. None is "mosaic_tpu" on a TPU and
            "xla" otherwise; "mosaic_gpu" has to be named until it has met a GPU.

    Raises:
        ValueError: for an unknown implementation or one that cannot run, for operands
            that do not fit, and for ids outside of the matrix.
    """
    name = _default() if implementation is None else implementation
    choose("implementation", name, IMPLEMENTATIONS)
    _check(x, w)
    if 0 in (x.size, w.values.size):
        return jnp.zeros((x.shape[0], w.shape[1]), x.dtype)
    rows, columns = _bounded(w)
    missing = w.grid[0] * w.values.shape[1] - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing))) if missing else x
    y = IMPLEMENTATIONS[name](x, w.values, rows, columns, w.grid)
    return y[:, : w.shape[1]]


def _default() -> str:
    return "mosaic_tpu" if platform() == "tpu" else "xla"


def _capacity(live: Any, capacity: int | None) -> int:
    if _traced(live):
        if capacity is None:
            raise ValueError(
                "capacity=None: the live blocks of a traced mask cannot be counted;"
                " give the largest number"
            )
        return capacity
    count = int(np.asarray(live).sum())
    if capacity is not None and count > capacity:
        raise ValueError(
            f"capacity={capacity}: {count} blocks are live; raise it, or leave it out"
        )
    return count if capacity is None else capacity


def _traced(*arrays: Any) -> bool:
    return any(isinstance(x, Tracer) for x in arrays)


def _check(x: Array, w: BlockSparse) -> None:
    if x.shape[1] != w.shape[0] or x.dtype != w.values.dtype:
        raise ValueError(
            f"x {x.dtype}{x.shape} and w {w.values.dtype}{w.shape}: the width and the"
            " dtype must agree; cast the weight's values to x.dtype"
        )
    if w.rows.shape != w.values.shape[:1] or w.columns.shape != w.values.shape[:1]:
        raise ValueError(
            f"rows {w.rows.shape} and columns {w.columns.shape}: must have one entry"
            f" for each of the {w.values.shape[0]} blocks of values"
        )
    for name, count in zip(("rows", "columns"), w.grid, strict=True):
        ids = getattr(w, name)
        if not _traced(ids) and ids.size and int(np.asarray(ids).max()) >= count:
            raise ValueError(
                f"{name} up to {int(np.asarray(ids).max())}: a matrix of {w.shape} in"
                f" blocks of {w.values.shape[1:]} has {count}; count blocks, not"
                " weights, from 0"
            )


def _bounded(w: BlockSparse) -> tuple[Array, Array]:
    """Ids as int32; both -1 where one of them is outside."""
    rows, columns = (jnp.asarray(x).astype("int32") for x in (w.rows, w.columns))
    live = (rows >= 0) & (rows < w.grid[0]) & (columns >= 0) & (columns < w.grid[1])
    return jnp.where(live, rows, -1), jnp.where(live, columns, -1)


def _reference(
    x: Array, values: Array, rows: Array, columns: Array, grid: tuple[int, int]
) -> Array:
    """One product for each entry, added up by column."""
    live = (rows >= 0)[:, None, None]
    blocks = x.astype(jnp.float32).reshape(x.shape[0], grid[0], -1).swapaxes(0, 1)
    values = jnp.where(live, values, 0).astype(jnp.float32)
    parts = jnp.where(live, blocks[rows], 0) @ values
    y = jax.ops.segment_sum(parts, columns, grid[1])  # drops what is negative
    return y.swapaxes(0, 1).reshape(x.shape[0], -1).astype(x.dtype)


Implementation = Callable[[Array, Array, Array, Array, tuple[int, int]], Array]
IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": _reference,
    "xla": xla,
    "mosaic_tpu": late("sparsejax.masked.block_sparse_tpu", "mosaic_tpu"),
    "mosaic_gpu": late("sparsejax.masked.block_sparse_gpu", "mosaic_gpu"),
}
