"""Low-rank adaptation: each matrix moves by a product of two thin ones, all else rests.

``low_rank(make, lora)`` turns an optimiser into one of the thin matrices. They are part
of its state, and its updates are what their product changes by, so the parameters are
at every step those of the adapted model: evaluation, export and checkpoints need to
know nothing of it.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax import tree
from sparsejax.config import ConfigError, near, require
from sparsejax.train.matrices import matrix_axes
from sparsejax.typing import Array, Float, PyTree

__all__ = ["LoraConfig", "LoraState", "Thin", "low_rank", "matrix_of"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices are adapted, and how thin what is added to them is."""

    rank: int = 8
    scale: float = 2.0  # of the product: alpha over rank
    include: tuple[str, ...] = ()  # regexes of paths; none: every hidden matrix

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "must be at least 1")
        require(self.scale > 0, "scale", self.scale, "must be positive")


class Thin(NamedTuple):
    """The two factors of what is added, each by the path of its matrix."""

    down: dict[str, nnx.Variable]  # [*stack, inputs, rank]
    up: dict[str, nnx.Variable]  # [*stack, rank, outputs]


class LoraState(NamedTuple):
    """The factors, and their optimiser's state."""

    thin: Thin
    inner: PyTree


def matrix_of(path: str) -> str:
    """Give the path of the matrix that a factor in ``Thin`` is of."""
    return path.partition("/")[2]


def low_rank(
    make: Callable[[Thin], optax.GradientTransformationExtraArgs],
    lora: LoraConfig,
    params: PyTree,
) -> optax.GradientTransformationExtraArgs:
    """Let an optimiser move ``scale * down @ up`` in the place of each matrix.

    ``down`` begins as noise of variance one over the inputs, ``up`` as zeros, so the
    first step starts where the matrices are. A stack of layers or of experts has
    factors for each; the heads of a projection are one matrix.

    Source: Hu et al. 2021, arXiv:2106.09685, Sec. 4.1. Departure: the product is merged
    into the matrix after every step, not computed beside it, so rounding adds up.

    Args:
        make: builds the optimiser of the factors, from their shapes.
        lora: which matrices, and the rank.
        params: the parameters with their ``axes``, or their shapes.

    Raises:
        ConfigError: if there is no such matrix, a pattern matches none, or the rank is
            no less than a side of one.
    """
    chosen = _chosen(lora, params)
    inner = make(jax.eval_shape(lambda: _begin(chosen, lora)))

    def init(params: PyTree) -> LoraState:
        del params
        thin = _begin(chosen, lora)
        return LoraState(thin, inner.init(thin))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del params
        thin, grads = state.thin, _gradients(state.thin, updates, chosen, lora.scale)
        steps, after = inner.update(grads, state.inner, thin, **extra)
        moved: Any = optax.apply_updates(thin, steps)
        changes = _changes(thin, moved, lora.scale)

        def one(path: str, update: Array) -> Array:
            if path not in changes:
                return jnp.zeros_like(update)
            return changes[path].reshape(update.shape)

        return tree.map_with_path(one, updates), LoraState(moved, after)

    return optax.GradientTransformationExtraArgs(init, update)


class _Kind(NamedTuple):
    """A parameter as a stack of matrices."""

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: str  # of the stack alone

    def flat(self, x: Array) -> Float[Array, "*stack n m"]:
        return x.reshape(*self.stack, math.prod(self.inputs), math.prod(self.outputs))


def _chosen(lora: LoraConfig, params: PyTree) -> dict[str, _Kind]:
    """Find the matrices."""
    kinds, arrays = {}, tree.leaves(params)
    for path, axes in tree.axes_of(params).items():
        split, shape = matrix_axes(axes), arrays[path].shape
        if split is not None:
            first = split[0][0]
            inputs, outputs = (tuple(shape[i] for i in side) for side in split)
            stack = " ".join(axes.split()[:first])
            kinds[path] = _Kind(shape[:first], inputs, outputs, stack)
    for pattern in lora.include:
        if not any(re.search(pattern, path) for path in kinds):
            raise ConfigError(
                f"config.optim.lora.include={pattern!r}: matches no matrix"
                f"{near(pattern, kinds)}"
            )
    patterns = lora.include or ("",)
    chosen = {p: k for p, k in kinds.items() if any(re.search(x, p) for x in patterns)}
    if not chosen:
        raise ConfigError("config.optim.lora: the model has no hidden matrix; leave it")
    for path, kind in chosen.items():
        side = min(math.prod(kind.inputs), math.prod(kind.outputs))
        if lora.rank >= side:
            raise ConfigError(
                f"config.optim.lora.rank={lora.rank}: must be less than {side}, the"
                f" shorter side of {path}; lower it, or leave the path out of include"
            )
    return chosen


def _begin(chosen: dict[str, _Kind], lora: LoraConfig) -> Thin:
    thin = Thin({}, {})
    for path, kind in chosen.items():
        n, m = math.prod(kind.inputs), math.prod(kind.outputs)
        key = jax.random.key(zlib.crc32(path.encode()))
        noise = jax.random.normal(key, (*kind.stack, n, lora.rank)) / jnp.sqrt(1.0 * n)
        zeros = jnp.zeros((*kind.stack, lora.rank, m))
        axes = f"{kind.axes} 1 1".strip()
        thin.down[path] = nnx.Param(noise, axes=axes)
        thin.up[path] = nnx.Param(zeros, axes=axes)
    return thin


def _gradients(
    thin: Thin, updates: PyTree, chosen: dict[str, _Kind], scale: float
) -> Thin:
    """Go from the gradient of ``down @ up`` to those of both, by the chain rule."""
    found, grads = tree.leaves(updates), Thin({}, {})
    for path, kind in chosen.items():
        whole = scale * kind.flat(found[path])
        down, up = (x[path].get_value() for x in thin)
        grads.down[path] = thin.down[path].replace(whole @ up.mT)
        grads.up[path] = thin.up[path].replace(down.mT @ whole)
    return grads


def _changes(before: Thin, after: Thin, scale: float) -> dict[str, Array]:
    """Give what each product has changed by, without the products' difference."""
    changes = {}
    for path in before.down:
        (down, up), (down_now, up_now) = (
            (x.down[path].get_value(), x.up[path].get_value()) for x in (before, after)
        )
        change = (down_now - down) @ up_now + down @ (up_now - up)
        changes[path] = scale * change
    return changes
