"""Reference pages, as Markdown: every public name of a package, from its docstring.

A package's ``__all__`` says what is public. Dicts of methods become tables, and what
they hold is described like a public name: a method is reached by its key.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

PACKAGES = (
    "attention",
    "moe",
    "memory",
    "masked",
    "scaling",
    "interop",
    "nn",
    "data",
    "sharding",
    "sweep",
)

_CITED = re.compile(r"(?<!`)arXiv:(\d{4}\.\d{4,5})")


def markdown(package: str) -> str:
    """Write the reference of a package, below a heading that is there already."""
    module = importlib.import_module(package)
    named = {name: getattr(module, name) for name in module.__all__}
    parts = [_directive("module", package, "no-members")]
    tables = {n: v for n, v in named.items() if n.isupper() and isinstance(v, dict)}
    if tables:
        parts += ["## Tables"]
    parts += [_table(name, table) for name, table in tables.items()]
    described = dict(_described(module, named, tables))
    for heading, kind in (("Functions", "function"), ("Classes", "class")):
        found = sorted((n, p) for p, (n, k) in described.items() if k == kind)
        if found:
            parts += [f"## {heading}", *(_directive(kind, path) for _, path in found)]
    return "\n" + "\n\n".join(parts) + "\n"


def summary(value: Any) -> str:
    """Give the first sentence of a docstring; of a record, that of its function."""
    for each in (value, *(value if isinstance(value, tuple) else ())):
        if hasattr(each, "__name__"):
            return (inspect.getdoc(each) or "").partition("\n\n")[0].replace("\n", " ")
    return ""


def skipped(*event: Any) -> bool | None:
    """Leave out what a named tuple says of its own fields: only their numbers."""
    documented = getattr(event[3], "__doc__", None) or ""
    return True if documented.startswith("Alias for field number") else None


def signature(*event: Any) -> tuple[str, None] | None:
    """Give a module's own arguments; NNX's metaclass takes whatever comes."""
    _, kind, _, value, _, printed, _ = event
    if kind != "class" or not str(printed).startswith("(*args"):
        return None
    found = inspect.signature(value.__init__)
    own = [p for name, p in found.parameters.items() if name != "self"]
    return str(found.replace(parameters=own)), None


def linked(*event: Any) -> None:
    """Lead from what a docstring cites to the paper."""
    lines = event[-1]
    lines[:] = [_CITED.sub(r"`\g<0> <https://arxiv.org/abs/\1>`__", x) for x in lines]


def _described(
    module: ModuleType, named: dict[str, Any], tables: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Give ``path, (name, kind)`` of functions and classes of this package."""
    public = {id(value): f"{module.__name__}.{name}" for name, value in named.items()}
    values = [*named.values(), *(v for t in tables.values() for v in t.values())]
    for value in values:
        kind = "class" if inspect.isclass(value) else "function"
        if kind == "function" and not inspect.isfunction(value):
            continue
        own = f"{value.__module__}.{value.__qualname__}"
        path = public.get(id(value), own)
        ours = path.startswith(f"{module.__name__}.") and "<" not in path
        if ours and not value.__name__.startswith("_"):
            yield path, (path.rpartition(".")[2], kind)


def _table(name: str, table: dict[str, Any]) -> str:
    rows = [f"| `{key}` | {_cell(summary(value))} |" for key, value in table.items()]
    heading = [f"### {name}", ""]
    if 2 * sum(row.endswith("|  |") for row in rows) > len(rows):
        return "\n".join([*heading, ", ".join(f"`{key}`" for key in table)])
    return "\n".join([*heading, "| name | what it is |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _directive(kind: str, path: str, *options: str) -> str:
    lines = [f".. auto{kind}:: {path}", *(f"   :{option}:" for option in options)]
    return "\n".join(["```{eval-rst}", *lines, "```"])
