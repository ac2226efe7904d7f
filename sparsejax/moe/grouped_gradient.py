"""The gradient of a grouped product is two more of them."""

from collections.abc import Callable
from typing import Any

import jax

from sparsejax.partition import alike
from sparsejax.typing import Array

__all__ = ["differentiable"]

# ``(rows, w, group_sizes, contract=axis)``: rows by their group's weight, contracting
# axis 0 or 1 of it; and ``(x, dy, group_sizes)``: ``x.T @ dy`` of each group.
ByWeights = Callable[..., Array]
ByRows = Callable[[Array, Array, Array], Array]


def differentiable(by_weights: ByWeights, by_rows: ByRows) -> Callable[..., Array]:
    """Make ``(x, w, group_sizes) -> y`` of the two products."""

    @jax.custom_vjp
    def product(x: Array, w: Array, group_sizes: Array) -> Array:
        return by_weights(x, w, group_sizes, contract=0)

    def forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, Any]:
        # Not product, which has no forward mode: curvature is that of a gradient.
        y = by_weights(x, w, group_sizes, contract=0)
        return y, (x, w, group_sizes)

    def backward(residuals: Any, dy: Array) -> tuple[Array, Array, None]:
        x, w, group_sizes = residuals
        dx = by_weights(dy, w, group_sizes, contract=1)
        return dx, by_rows(x, dy, group_sizes), None

    product.defvjp(forward, backward)
    return lambda *operands: product(*alike(operands))
