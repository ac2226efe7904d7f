"""Experts: many small feed-forward networks, stacked along the axis ``e``.

An expert is ``(activation(x gate) * (x up)) down``. There are two ways of applying the
stack: ``grouped`` takes rows sorted by expert and the size of each group; ``batched``
takes the same number of rows for every expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.moe.grouped import grouped_matmul
from sparsejax.typing import Array, Float, Int

__all__ = ["ACTIVATIONS", "GatedExperts", "batched", "grouped", "squared_relu"]


def squared_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square what is positive, zero the rest.

    Source: So et al. 2021, arXiv:2109.08668, Sec. 4.
    """
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "squared_relu": squared_relu,
}


class GatedExperts(NamedTuple):
    """Weights of all experts, or of those a device holds."""

    gate: Float[Array, "e d f"]
    up: Float[Array, "e d f"]
    down: Float[Array, "e f d"]


def grouped(
    x: Float[Array, "m d"],
    experts: GatedExperts,
    group_sizes: Int[Array, " e"],
    *,
    activation: Callable[[Array], Array],
) -> Float[Array, "m d"]:
    """Apply each expert to its group of consecutive rows; rows past the last give 0."""
    gate = activation(grouped_matmul(x, experts.gate, group_sizes))
    hidden = gate * grouped_matmul(x, experts.up, group_sizes)
    return grouped_matmul(hidden, experts.down, group_sizes)


def batched(
    x: Float[Array, "e q d"],
    experts: GatedExperts,
    *,
    activation: Callable[[Array], Array],
) -> Float[Array, "e q d"]:
    """Apply each expert to its slice of ``x``."""
    gate = activation(jnp.einsum("eqd,edf->eqf", x, experts.gate))
    hidden = gate * jnp.einsum("eqd,edf->eqf", x, experts.up)
    return jnp.einsum("eqf,efd->eqd", hidden, experts.down)
