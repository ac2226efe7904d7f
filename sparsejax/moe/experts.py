"""Experts: many small feed-forward networks, stacked along the axis ``e``.

An expert is ``hidden(x gate, x up) down``, where ``HIDDEN`` has the functions in the
middle; an expert without a gate passes None for it. There are two ways of applying the
stack: ``grouped`` takes rows sorted by expert and the size of each group; ``batched``
takes the same number of rows for every expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.moe.grouped import grouped_matmul
from sparsejax.typing import Array, Float, Int

__all__ = [
    "ACTIVATIONS",
    "HIDDEN",
    "GatedExperts",
    "Hidden",
    "axes_of_experts",
    "batched",
    "clamped_swiglu",
    "grouped",
    "squared_relu",
    "with_one_bias",
]

Hidden = Callable[[Array | None, Array], Array]


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


def _plain(activation: Callable[[Array], Array]) -> Hidden:
    """Multiply by the activated gate; without a gate, activate."""

    def hidden(gate: Array | None, up: Array) -> Array:
        return activation(up) if gate is None else activation(gate) * up

    return hidden


def clamped_swiglu(
    gate: Float[Array, "*shape f"] | None, up: Float[Array, "*shape f"]
) -> Float[Array, "*shape f"]:
    """Gate by a steeper SiLU, add one, and let nothing exceed 7.

    Source: OpenAI 2025, arXiv:2508.10925, Sec. 2.2.
    """
    if gate is None:
        raise ValueError("gate=None: clamped_swiglu multiplies by one; give it a gate")
    gate, up = jnp.minimum(gate, 7), jnp.clip(up, -7, 7)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


HIDDEN: dict[str, Hidden] = {
    **{name: _plain(activation) for name, activation in ACTIVATIONS.items()},
    "clamped_swiglu": clamped_swiglu,
}


class GatedExperts(NamedTuple):
    """Weights of all experts, or of those a device holds; None for what is absent."""

    gate: Float[Array, "e d f"] | None
    up: Float[Array, "e d f"]
    down: Float[Array, "e f d"]
    gate_bias: Float[Array, "e f"] | None = None
    up_bias: Float[Array, "e f"] | None = None
    down_bias: Float[Array, "e d"] | None = None


AXES = ("e d f", "e d f", "e f d", "e f", "e f", "e d")


def axes_of_experts(experts: GatedExperts) -> GatedExperts:
    """Give the letters of the weights that are there."""
    axes = zip(experts, AXES, strict=True)
    return GatedExperts(*(None if w is None else a for w, a in axes))  # pyright: ignore


def with_one_bias(experts: GatedExperts, axis: str | None) -> GatedExperts:
    """Keep the answers' bias on one device of those whose parts are summed."""
    if axis is None or experts.down_bias is None:
        return experts
    first = jax.lax.axis_index(axis) == 0
    return experts._replace(down_bias=jnp.where(first, experts.down_bias, 0))


def grouped(
    x: Float[Array, "m d"],
    experts: GatedExperts,
    group_sizes: Int[Array, " e"],
    *,
    activation: Hidden,
    implementation: str | None = None,
) -> Float[Array, "m d"]:
    """Apply each expert to its group of consecutive rows; rows past the last give 0.

    Args:
        implementation: of ``grouped_matmul``.
    """

    def product(x: Array, weight: Array, bias: Array | None) -> Array:
        y = grouped_matmul(x, weight, group_sizes, implementation=implementation)
        if bias is None:
            return y
        rows = jnp.arange(x.shape[0], dtype=group_sizes.dtype)
        own = jnp.searchsorted(jnp.cumsum(group_sizes), rows, side="right")
        # Its gradient is a sum over rows, which in bfloat16 would stand still.
        wide = bias.astype(jnp.float32).at[own].get(mode="fill", fill_value=0)
        return y + wide.astype(y.dtype)

    return _expert(x, experts, product, activation)


def batched(
    x: Float[Array, "e q d"], experts: GatedExperts, *, activation: Hidden
) -> Float[Array, "e q d"]:
    """Apply each expert to its slice of ``x``."""

    def product(x: Array, weight: Array, bias: Array | None) -> Array:
        y = jnp.einsum("eqd,edf->eqf", x, weight)
        return y if bias is None else y + bias[:, None]

    return _expert(x, experts, product, activation)


def _expert(
    x: Array,
    experts: GatedExperts,
    product: Callable[[Array, Array, Array | None], Array],
    activation: Hidden,
) -> Array:
    gate = None
    if experts.gate is not None:
        gate = product(x, experts.gate, experts.gate_bias)
    hidden = activation(gate, product(x, experts.up, experts.up_bias))
    return product(hidden, experts.down, experts.down_bias)
