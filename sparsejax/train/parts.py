"""A batch in parts: micro-batches, and what is measured over all of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.data import Batch
from sparsejax.masked import Measured, measure
from sparsejax.partition import BATCH, constrain
from sparsejax.typing import Array, PyTree

__all__ = ["measured", "micro_batches"]


def micro_batches(batch: Batch, count: int) -> Batch:
    """Every ``count``-th row to each, so that each is spread over all devices."""

    def cut(x: Any) -> Array:
        x = jnp.asarray(x)
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, "a b t", {"b": BATCH})

    return jax.tree.map(cut, batch)


def measured(
    loss: Callable[[PyTree, Batch], Array],
    params: PyTree,
    parts: Batch,
    *,
    curvature: bool,
) -> Measured:
    """Differentiate the sum of the losses of micro-batches, one at a time."""

    def total(params: PyTree) -> Array:
        @jax.checkpoint
        def add(total: Array, part: Batch) -> tuple[Array, None]:
            return total + loss(params, part), None

        return jax.lax.scan(add, jnp.zeros(()), parts)[0]

    return jax.jit(lambda x: measure(total, x, curvature=curvature))(params)
