"""Masked weights that multiply by their live blocks only: ``x @ w`` for such a ``w``.

With ``products="blocks"``, ``effective`` puts a ``Blocked`` in the place of every
masked weight. Whatever multiplies from the left, ``x @ params["up"]``, then computes
with live blocks: the product, the gradient of ``x``, and that of the live blocks of the
weight. The gradient of all blocks is computed in those steps alone whose update looks
at it; in others it is 0 where nothing is live. Which blocks are live may change from
step to step, their number may not pass ``capacity``. While more than half are live,
products are dense ones: that is faster then.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax import masked
from sparsejax.masked.block_sparse import BlockSparse, block_sparse_matmul
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.plan import Target
from sparsejax.partition import ACTIVATIONS, alike, axis, per_shard
from sparsejax.typing import Array, Bool, Float

# Share of live blocks above which a dense product of the masked weight is faster.
FULL = 0.5
__all__ = ["Blocked", "live_blocks", "multiplying"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "live", "whole"],
    meta_fields=["capacity", "axes"],
)
@dataclass(frozen=True, eq=False)
class Blocked:
    """A masked matrix, or a stack of them for a scan to take apart.

    >>> w = Blocked(jnp.eye(4), jnp.eye(2, dtype=bool), None, capacity=2)
    >>> (jnp.ones((1, 4)) @ w).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """

    weight: Any  # [*stack d f], 0 outside of live blocks
    live: Any  # [*stack i j]
    whole: Any  # [*stack] whether dead blocks get a gradient; None if never
    capacity: int  # live blocks of a matrix, at most
    axes: str = ""  # letters of the matrix, for a mesh to cut it
    __array_ufunc__ = None  # arrays of NumPy ask __rmatmul__ too

    def __getitem__(self, index: Any) -> "Blocked":
        """Give itself for ``w[...]``, as a parameter's value is asked for."""
        if index is not Ellipsis:
            raise TypeError(
                f"w[{index!r}] of a weight with products='blocks', which only"
                " multiplies; use w[...], or products='dense'"
            )
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's, and its stack's."""
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weights."""
        return self.weight.dtype

    def astype(self, dtype: Any) -> "Blocked":
        """Cast the weights."""
        return replace(self, weight=self.weight.astype(dtype))

    def __rmatmul__(self, x: Any) -> Array:
        """Multiply rows by the live blocks; under a mesh each device has its own.

        Raises:
            ValueError: if the mesh cuts through blocks.
        """
        x, operands = jnp.asarray(x), (self.weight, self.live, self.whole)
        letters = self.axes.split()
        if not letters or x.ndim != 3:
            return self._product(x, *operands)
        inner, outer = letters
        cut = [n for n in ACTIVATIONS.get(inner, ()) if axis(n)]
        for letter, blocks in zip(letters, self.live.shape, strict=True):
            _check_cut(letter, blocks)

        def function(x: Array, *operands: Any) -> Array:
            y = self._product(x, *operands)
            return lax.psum(y, tuple(cut)) if cut else y

        inputs = (f"b t {inner}", self.axes, self.axes, "")
        both = {"inputs": inputs, "outputs": f"b t {outer}"}
        return per_shard(function, **both)(x, *operands)

    def _product(self, x: Array, weight: Array, live: Array, whole: Any) -> Array:
        rows, most = x.reshape(-1, x.shape[-1]), min(self.capacity, live.size)
        y: Array = _multiplied(most, *alike((rows, weight)), live, whole)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def live_blocks(
    mask: Bool[Array, "*stack d f"], sides: tuple[int, int]
) -> Bool[Array, "*stack i j"]:
    """Give one truth value for each block of a mask that is constant in them."""
    return mask[..., :: sides[0], :: sides[1]]


def multiplying(
    plan: MaskedConfig, target: Target, weight: Array, mask: Array, due: Array
) -> Any:
    """Give a masked weight as the plan wants it to multiply.

    Args:
        plan: says how.
        target: what the weight is.
        weight: masked.
        mask: which of it.
        due: whether this step's update changes masks, and may look at any gradient.
    """
    if not masked.PRODUCTS[plan.products]:
        return weight
    structure: Any = target.structure
    sides, letters = structure.sides, target.axes.split()
    moves = masked.UPDATERS[plan.updater] is not masked.UPDATERS["static"]
    ranked = masked.ALLOCATIONS[plan.allocation] in masked.RANKED_BY
    opens = plan.dense_from is not None or ranked
    live = live_blocks(mask, sides)
    most = math.prod(live.shape[-2:])
    if not opens:
        most = min(most, target.count(target.ramp.initial) // math.prod(sides))
    whole = jnp.broadcast_to(due, target.stack) if moves else None
    return Blocked(weight, live, whole, most, " ".join(letters[len(target.stack) :]))


def _check_cut(letter: str, blocks: int) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    for name in ACTIVATIONS.get(letter, ()):
        if axis(name) and blocks % mesh.shape[name]:
            raise ValueError(
                f"products='blocks': {blocks} blocks along {letter!r} cannot be cut"
                f" into the {mesh.shape[name]} of the mesh axis {name!r}; choose"
                " smaller blocks, or another mesh"
            )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiplied(capacity: int, x: Array, weight: Array, live: Array, _: Any) -> Array:
    def by_blocks(blocks: BlockSparse) -> Array:
        return block_sparse_matmul(x, blocks)

    return _either(capacity, weight, live, lambda: x @ weight, by_blocks)


def _either(
    capacity: int,
    weight: Array,
    live: Array,
    dense: Callable[[], Array],
    by_blocks: Callable[[BlockSparse], Array],
) -> Array:
    """Compute with the live blocks, or with everything where too many are live."""
    most = int(FULL * live.size)

    def sparse() -> Array:
        count = min(capacity, most)
        return by_blocks(BlockSparse.from_dense(weight, live, capacity=count))

    if capacity <= most:
        return sparse()
    return lax.cond(jnp.sum(live) > most, dense, sparse)


def _forward(capacity: int, *operands: Any) -> tuple[Array, Any]:
    return _multiplied(capacity, *operands), operands


def _backward(capacity: int, operands: Any, dy: Array) -> tuple[Any, ...]:
    x, weight, live, whole = operands
    either = partial(_either, capacity, weight, live)

    def to_rows(blocks: BlockSparse) -> Float[Array, "n d"]:
        return jax.vjp(lambda x: block_sparse_matmul(x, blocks), x)[1](dy)[0]

    def to_blocks(blocks: BlockSparse) -> Float[Array, "d f"]:
        def product(values: Array) -> Array:
            return block_sparse_matmul(x, replace(blocks, values=values))

        values = jax.vjp(product, blocks.values)[1](dy)[0]
        return replace(blocks, values=values).to_dense()

    def to_all() -> Float[Array, "d f"]:
        return x.T @ dy

    dx = either(lambda: dy @ weight.T, to_rows)
    if whole is None:
        return dx, either(to_all, to_blocks), None, None
    dw = lax.cond(whole, to_all, lambda: either(to_all, to_blocks))
    return dx, dw, None, None


_multiplied.defvjp(_forward, _backward)
