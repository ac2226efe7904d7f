"""Trees of parameters, seen as tables from a path to a leaf.

A path is written ``stacks/0/0/attention/query``: names joined by slashes, the way
configs, checkpoints, error messages and metrics all spell it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.tree_util import GetAttrKey

from sparsejax.typing import PyTree


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def path_name(path: tuple[Any, ...]) -> str:
    """Spell a JAX key path; the inside of an ``nnx.Variable`` adds no name to it."""
    inside = len(path) > 1 and path[-1] == GetAttrKey("value")
    keys = path[:-1] if inside else path
    return "/".join(
        str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys
    )


def longest_match(table: Mapping[str, float], path: str, otherwise: float) -> float:
    """Give what a table has for the longest of its regexes that a path matches.

    Not for the first: a ``ConfigDict`` sorts its keys.
    """
    found = [pattern for pattern in table if re.search(pattern, path)]
    return table[max(found, key=len)] if found else otherwise


def leaves(tree: PyTree) -> dict[str, Any]:
    """Give every array of a tree under its path, in the tree's own order."""
    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def variables(tree: PyTree) -> dict[str, nnx.Variable]:
    """Give every ``nnx.Variable`` of a tree under its path, in the tree's own order."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)
    return {path_name(p): x for p, x in flat if isinstance(x, nnx.Variable)}


def axes_of(tree: PyTree) -> dict[str, str]:
    """Axis letters of every ``nnx.Variable`` that carries them, by path."""
    return {
        path: x.get_metadata().get("axes", "") for path, x in variables(tree).items()
    }


def map_with_path(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map ``function(path, leaf, *others)`` over the arrays of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *xs: function(path_name(path), *xs), tree, *rest
    )
