"""Lists of live blocks, and the gradient of a product with them: two more products."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.partition import alike
from sparsejax.typing import Array, Int

__all__ = ["Lists", "differentiable", "filled"]


class Lists(NamedTuple):
    """Live entries by their own side: block ``i`` has ``start[i]`` to ``start[i+1]``.

    >>> Lists.of(jnp.array([1, -1, 0, 1]), 2)
    Lists(order=Array([2, 0, 3, 1], dtype=int32), start=Array([0, 1, 3], dtype=int32))
    """

    order: Int[Array, " live"]  # entries; those that are not live come last
    start: Int[Array, " blocks"]

    @classmethod
    def of(cls, own: Int[Array, " live"], count: int) -> "Lists":
        """Sort entries by their side, of so many blocks; -1 is no block."""
        own = jnp.where(own < 0, count, own)
        order = jnp.argsort(own, stable=True).astype(jnp.int32)
        blocks = jnp.arange(count + 1, dtype=own.dtype)
        start = jnp.searchsorted(own[order], blocks)
        return cls(order, start.astype(jnp.int32))


# ``(x, values, own, other, count, turned=…)``: rows by the blocks, added up over those
# that share ``own`` of ``count`` blocks of the output; contracted over a block's first
# axis or, turned, over its last. And ``(x, dy, rows, columns, grid)``: ``x.T @ dy`` of
# each entry, 0 for one that is not live.
ByWeights = Callable[..., Array]
ByRows = Callable[[Array, Array, Array, Array, tuple[int, int]], Array]


def differentiable(by_weights: ByWeights, by_rows: ByRows) -> Callable[..., Array]:
    """Make ``(x, values, rows, columns, grid) -> y`` of the two products."""

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def product(
        x: Array, values: Array, rows: Array, columns: Array, grid: tuple[int, int]
    ) -> Array:
        return by_weights(x, values, columns, rows, grid[1], turned=False)

    def forward(
        x: Array, values: Array, rows: Array, columns: Array, grid: tuple[int, int]
    ) -> tuple[Array, Any]:
        # Not product, which has no forward mode: curvature is that of a gradient.
        y = by_weights(x, values, columns, rows, grid[1], turned=False)
        return y, (x, values, rows, columns)

    def backward(grid: tuple[int, int], residuals: Any, dy: Array) -> tuple[Any, ...]:
        x, values, rows, columns = residuals
        dx = by_weights(dy, values, rows, columns, grid[0], turned=True)
        return dx, by_rows(x, dy, rows, columns, grid), None, None

    product.defvjp(forward, backward)
    return lambda *given: product(*alike(given[:4]), given[4])


def filled(x: Array, tall: int) -> Array:
    """Add rows of zeros up to a multiple of a tile's."""
    missing = -x.shape[0] % tall
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x
