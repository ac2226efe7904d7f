"""From a plan and a tree of parameters to the layers that are masked, and how.

Everything here is decided once, in Python integers, before anything is traced: which
parameters, which of their axes only stack layers, what structure, how many weights.
"""

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masked, tree
from sparsejax.config import near
from sparsejax.masked.allocations import Layer, matching
from sparsejax.masked.config import MaskedConfig
from sparsejax.masked.schedules import Ramp
from sparsejax.masked.structures import Structure
from sparsejax.typing import Array, Int, PyTree

__all__ = ["Target", "depth", "layer_of", "targets"]

STACK = ("l", "e")  # leading axes that stack layers and experts
# What stays dense unless ``include`` says otherwise: by axis, and for trees without
# axes by name. Embeddings, memory slots and their keys; routers end in experts.
DENSE_AXES = frozenset("vmre")
DENSE_NAMES = (
    r"(^|/)(\w*embedding\w*|\w*norm\w*|\w*bias|router\w*|keys|table|sinks?)(/|$)"
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One masked parameter: a stack of layers that have a mask and a budget each."""

    path: str
    axes: str  # of the whole parameter; empty if it has none
    shape: tuple[int, ...]  # of one layer
    stack: tuple[int, ...]  # how many of them
    structure: Structure
    ramp: Ramp

    @property
    def size(self) -> int:
        """Count the weights of one layer."""
        return math.prod(self.shape)

    def each(self, function: Any) -> Any:
        """Map over the axes that stack layers."""
        for _ in self.stack:
            function = jax.vmap(function)
        return function

    def keys(self, seed: int, step: int | Int[Array, ""]) -> Array:
        """Give one key a layer, a function of the seed, the step and the path alone."""
        key = jax.random.fold_in(jax.random.key(seed), step)
        key = jax.random.fold_in(key, zlib.crc32(self.path.encode()))
        return jax.random.split(key, self.stack)

    @property
    def is_dense(self) -> bool:
        """Whether all is kept to the end: there is nothing to mask, then or ever."""
        return self.count(self.ramp.final) == math.prod(self.shape)

    def count(self, density: float) -> int:
        """Round a density to a number of weights that the structure can keep.

        Raises:
            ValueError: if nothing would be left.
        """
        quantum = self.structure.quantum(self.shape)
        keep = round(density * math.prod(self.shape) / quantum) * quantum
        if keep == 0:
            raise ValueError(
                f"density={density} of {self.path}, {self.shape}, rounds to no weight"
                " at all; raise the density, or exclude it"
            )
        return keep

    def keep(self, density: Array) -> Int[Array, ""]:
        """Count what a traced density keeps; exact at both ends of the ramp."""
        quantum = self.structure.quantum(self.shape)
        units = math.prod(self.shape) // quantum
        first, last = self.count(self.ramp.initial), self.count(self.ramp.final)
        between = jnp.round(density * units).astype(jnp.int32) * quantum
        count = jnp.clip(between, last, first)
        count = jnp.where(density == jnp.float32(self.ramp.initial), first, count)
        return jnp.where(density == jnp.float32(self.ramp.final), last, count)

    def structure_at(self, step: int | Int[Array, ""]) -> Structure:
        """Give the structure of masks that are chosen at a step; -1 is before all."""
        structure: Any = self.structure
        return structure.at(step, self.ramp) if hasattr(structure, "at") else structure

    def moved(self, keep: Array, fraction: Array) -> Int[Array, ""]:
        """Count what moves when a fraction of the live weights does, rounded down."""
        quantum = self.structure.quantum(self.shape)
        units = (keep // quantum).astype(jnp.float32)
        return jnp.floor(fraction * units).astype(jnp.int32) * quantum


def depth(letters: list[str]) -> int:
    """Count the leading axes that only stack layers."""
    inner = [i for i, letter in enumerate(letters) if letter not in STACK]
    return inner[0] if inner else len(letters)


def targets(params: PyTree, plan: MaskedConfig) -> dict[str, Target]:
    """Give every parameter that the plan masks, by path.

    Raises:
        ValueError: if a filter matches nothing, a structure does not fit a parameter,
            or a layer would keep nothing.
    """
    axes, arrays = tree.axes_of(params), tree.leaves(params)
    paths = _chosen(plan, {p: axes.get(p, "") for p in arrays}, arrays)
    letters = {p: axes.get(p, "").split() for p in paths}
    layers = {p: layer_of(arrays[p].shape, letters[p]) for p in paths}
    for given in plan.updater_arguments.values():
        matching(layers, given if isinstance(given, Mapping) else ())
    allocate = masked.ALLOCATIONS[plan.allocation]
    ends = [
        allocate(layers, density, **plan.allocation_arguments)
        for density in (plan.initial, plan.density)
    ]
    found = {}
    for path in paths:
        first = depth(letters[path])
        found[path] = Target(
            path=path,
            axes=axes.get(path, ""),
            shape=tuple(arrays[path].shape[first:]),
            stack=tuple(arrays[path].shape[:first]),
            structure=_structure(plan, path, letters[path][first:]),
            ramp=plan.ramp._replace(
                initial=_initial(plan, ends[0][path], ends[1][path]),
                final=ends[1][path],
            ),
        )
        _check(found[path], plan)
    _check_ranking(found, plan)
    _check_products(found, plan, params)
    return found


def _initial(plan: MaskedConfig, initial: float, final: float) -> float:
    """Give where a path begins; one that was given an end of its own, like the plan."""
    falls = plan.initial > plan.density
    return max(plan.initial if falls and initial == final else initial, final)


def _chosen(
    plan: MaskedConfig, axes: Mapping[str, str], arrays: Mapping[str, Array]
) -> list[str]:
    for name in ("include", "exclude"):
        for pattern in getattr(plan, name):
            if not any(re.search(pattern, path) for path in arrays):
                raise ValueError(
                    f"{name}={pattern!r} matches no parameter{near(pattern, arrays)};"
                    f" there are {', '.join(arrays)}"
                )
    chosen = [
        path
        for path in arrays
        if not any(re.search(pattern, path) for pattern in plan.exclude)
        and (
            any(re.search(pattern, path) for pattern in plan.include)
            if plan.include
            else _is_weight(path, axes[path].split(), arrays[path].ndim)
        )
    ]
    if not chosen:
        raise ValueError(
            f"include={plan.include!r} and exclude={plan.exclude!r} leave nothing to"
            f" mask; there are {', '.join(arrays)}"
        )
    return chosen


def _is_weight(path: str, letters: list[str], ndim: int) -> bool:
    """Whether a parameter is a matrix that the default masks."""
    inner = letters[depth(letters) :]
    rank = len(inner) if letters else ndim
    named = re.search(DENSE_NAMES, path) is not None
    return rank >= 2 and not named and DENSE_AXES.isdisjoint(inner)


def layer_of(shape: tuple[int, ...], letters: list[str]) -> Layer:
    """Describe the matrix that a parameter is: heads and their width are one side."""
    first = depth(letters)
    sides: list[int] = []
    for index in range(first, len(shape)):
        if letters[index - 1 : index + 1] in (["h", "c"], ["g", "c"]):
            sides[-1] *= shape[index]
        else:
            sides.append(shape[index])
    return Layer(tuple(sides), math.prod(shape[:first]))


def _structure(plan: MaskedConfig, path: str, letters: list[str]) -> Structure:
    """Build the structure; an axis may be named by its letter, or by several to try."""
    arguments = dict(plan.structure_arguments)
    axis = arguments.get("axis")
    if isinstance(axis, str):
        found = [letters.index(letter) for letter in axis if letter in letters]
        if not found:
            raise ValueError(
                f"structure_arguments.axis={axis!r} is no axis of {path}, which has"
                f" {' '.join(letters) or 'no names'}; give a number, or exclude it"
            )
        arguments["axis"] = found[0]
    return masked.STRUCTURES[plan.structure](**arguments)


def _check(target: Target, plan: MaskedConfig) -> None:
    quantum, shape = target.structure.quantum(target.shape), target.shape
    keep = target.count(target.ramp.final)
    if math.prod(shape) >= 2**31:
        raise ValueError(
            f"{target.path}: a layer of shape {shape} has more weights than an int32"
            " counts; stack it, or exclude it"
        )
    grows = masked.UPDATERS[plan.updater] in masked.GROWING
    if grows and int(plan.moved * keep) < quantum:
        raise ValueError(
            f"moved={plan.moved} of the {keep} weights that {target.path} keeps is less"
            f" than the {quantum} that its structure moves at once; raise moved, or"
            " exclude it"
        )


def _check_products(
    found: Mapping[str, Target], plan: MaskedConfig, params: PyTree
) -> None:
    """Products with live blocks are of matrices that do nothing but multiply."""
    if not masked.PRODUCTS[plan.products]:
        return
    known = tree.variables(params)
    for path, target in found.items():
        multiplies = path not in known or "multiplies" in known[path].get_metadata()
        structure: Any = target.structure
        sides = structure.sides
        if not multiplies or len(target.shape) != 2 or len(sides) != 2:
            raise ValueError(
                f"products={plan.products!r} of {path}, a layer of {target.shape} in"
                f" blocks of {sides}: its layer computes with dense products only, or"
                " the blocks have other axes; exclude it, include=('ffn',) say"
            )


def _check_ranking(found: Mapping[str, Target], plan: MaskedConfig) -> None:
    """One ranking over all layers needs one kind of unit."""
    allocation = masked.ALLOCATIONS[plan.allocation]
    shares = allocation in masked.SHARED_BY
    if allocation not in masked.RANKED_BY and not shares:
        return
    some = next(iter(found.values()))
    units = {x.structure.quantum(x.shape) for x in found.values()}
    if (
        not hasattr(some.structure, "units")
        or len(units) > 1
        or (shares and max(units) > 1)
    ):
        raise ValueError(
            f"allocation={plan.allocation!r} compares weights of all layers, and"
            f" structure={plan.structure!r} has units of {sorted(units)} weights in"
            " them; choose structure='unstructured', or another allocation"
        )
    if sum(x.size * math.prod(x.stack) for x in found.values()) >= 2**31:
        raise ValueError(
            f"allocation={plan.allocation!r} ranks more weights than an int32 counts;"
            " choose another, or exclude some"
        )
