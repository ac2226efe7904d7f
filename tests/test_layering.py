"""Imports point one way: ground floor, families, models, training."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.sources import PACKAGES, ROOT, Source, snippet, sources

FLOOR = (
    "citations",
    "compat",
    "config",
    "late",
    "partition",
    "ranking",
    "tree",
    "typing",
)
FAMILIES = (
    "activation",
    "adapters",
    "attention",
    "codes",
    "kv",
    "masked",
    "memory",
    "moe",
    "prune",
    "scaling",
)
# A module may import its own package and any lower rank; equal ranks are strangers.
RANKS = {
    **dict.fromkeys(FLOOR, 0),
    **dict.fromkeys(FAMILIES, 1),
    **dict.fromkeys(("data", "sharding"), 1),
    "nn": 2,
    "train": 3,
    "interop": 4,  # writes runs
    **dict.fromkeys(("kept", "papers", "sample"), 5),
    **dict.fromkeys(("convert", "evaluate"), 6),  # read runs as sampling does
    "bench": 7,
    "sweep": 8,
}
KERNEL_IMPORTS = {"jax", "jaxtyping", "numpy", "pallas_kernels"}
ABOVE = {"configs", "notebooks", "sweep", "tests", "train"}


def imports(source: Source, nodes: Iterator[ast.AST] | None = None) -> Iterator[str]:
    """Every module that a file imports, wherever in the file; names in full."""
    for node in nodes or ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                is_package = source.path.endswith("__init__.py")
                base = (
                    source.module[: len(source.module) + is_package - node.level] + base
                )
            yield from (".".join([*base, alias.name]) for alias in node.names)


def layer(module: str) -> str | None:
    """The part of sparsejax that a module is in; None outside of it."""
    package, _, rest = module.partition(".")
    name = rest.split(".")[0]
    return name if package == "sparsejax" and not name.startswith("__") else None


def trespasses(source: Source) -> list[str]:
    """The imports that break the rule of a file's layer."""
    if source.path.startswith("pallas_kernels"):
        legal = KERNEL_IMPORTS | sys.stdlib_module_names
        return [m for m in imports(source) if m.split(".")[0] not in legal]
    here = layer(".".join(source.module))
    rank = RANKS[here] if here else max(RANKS.values()) + 1
    found = []
    for module in imports(source):
        there = layer(module)
        upward = there and there != here and RANKS[there] >= rank
        both_floor = here in FLOOR and there in FLOOR
        kernel = here in FLOOR and module.startswith("pallas_kernels")
        outside = module.split(".")[0] in ABOVE
        if (upward and not both_floor) or kernel or outside:
            found.append(module)
    return found


@pytest.mark.parametrize("source", sources(*PACKAGES), ids=lambda s: s.path)
def test_a_module_imports_only_what_lies_below_it(source):
    assert trespasses(source) == []


def test_every_part_of_the_package_has_a_rank():
    inside = [p for p in (ROOT / "sparsejax").iterdir() if not p.name.startswith("_")]
    parts = {p.stem for p in inside if p.suffix == ".py" or [*p.glob("*.py")]}
    assert parts <= set(RANKS)


@pytest.mark.parametrize(
    ("path", "text", "trespass"),
    [
        ("sparsejax/moe/a.py", "import sparsejax.memory", "sparsejax.memory"),
        ("sparsejax/moe/a.py", "from sparsejax import kv", "sparsejax.kv"),
        ("sparsejax/moe/a.py", "from ..memory import bag", "sparsejax.memory.bag"),
        ("sparsejax/moe/__init__.py", "from .. import memory", "sparsejax.memory"),
        ("sparsejax/moe/a.py", "def f():\n  import sparsejax.nn", "sparsejax.nn"),
        ("sparsejax/tree.py", "from sparsejax.moe import x", "sparsejax.moe.x"),
        ("sparsejax/tree.py", "import pallas_kernels.flash", "pallas_kernels.flash"),
        ("sparsejax/nn/a.py", "import sparsejax.train.loop", "sparsejax.train.loop"),
        ("sparsejax/train/a.py", "import configs.moe", "configs.moe"),
        ("sparsejax/train/a.py", "import train", "train"),
        ("pallas_kernels/a/b.py", "import flax", "flax"),
        ("pallas_kernels/a/b.py", "from sparsejax.tree import x", "sparsejax.tree.x"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_found(path, text, trespass):
    assert trespasses(snippet(path, text)) == [trespass]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sparsejax/moe/a.py", "from sparsejax.typing import Array\nimport optax"),
        ("sparsejax/moe/a.py", "from .routers import switch"),
        ("sparsejax/moe/a.py", "from pallas_kernels import grouped"),
        ("sparsejax/moe/__init__.py", "from .routers import switch"),
        ("sparsejax/partition.py", "from sparsejax.typing import Array"),
        ("sparsejax/nn/a.py", "import sparsejax.moe, sparsejax.memory.bag"),
        ("sparsejax/train/a.py", "from sparsejax import nn, __version__"),
        ("pallas_kernels/a/b.py", "import math, jax.numpy\nfrom . import reference"),
    ],
)
def test_an_import_that_points_down_is_legal(path, text):
    assert trespasses(snippet(path, text)) == []


def graph(files: tuple[Source, ...]) -> dict[str, set[str]]:
    """Which modules of ours each one imports when it is itself imported.

    Its own package is left out: a family's config reads the family's registries.
    """
    names = {".".join(s.module) for s in files}
    edges = {}
    for source in files:
        wanted = imports(source, iter(source.tree.body))
        found = {m if m in names else m.rpartition(".")[0] for m in wanted}
        here = ".".join(source.module)
        edges[here] = {m for m in found & names if not f"{here}.".startswith(f"{m}.")}
    return edges


def test_no_module_imports_itself_by_a_detour():
    order = TopologicalSorter(graph(sources(*PACKAGES))).static_order()
    assert len(list(order)) == len(sources(*PACKAGES))


def test_a_detour_is_found():
    files = (
        snippet("sparsejax/moe/a.py", "from sparsejax.moe import b"),
        snippet("sparsejax/moe/b.py", "from sparsejax.moe.a import f"),
    )
    with pytest.raises(CycleError, match=r"sparsejax\.moe\.a"):
        list(TopologicalSorter(graph(files)).static_order())
