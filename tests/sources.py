"""The repository's Python files as text and syntax tree, for tests about the code."""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("sparsejax", "pallas_kernels")


class Source(NamedTuple):
    """One file; ``path`` is relative to the repository's root, with slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> list[str]:
        """Names of the module, outermost first; a package's are its folder's."""
        parts = self.path.removesuffix(".py").split("/")
        return parts[:-1] if parts[-1] == "__init__" else parts


def snippet(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Give every Python file under some folders of the root, or those files."""
    paths = [
        path
        for folder in folders
        for path in ([ROOT / folder], sorted((ROOT / folder).rglob("*.py")))[
            (ROOT / folder).is_dir()
        ]
        if path.is_file()
    ]
    return tuple(
        snippet(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths
    )
