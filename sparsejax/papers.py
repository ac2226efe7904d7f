"""Which published methods are here: collected from the code, never typed by hand.

Every docstring may carry lines ``Source: Authors Year, arXiv:ID, place``; where a paper
is not on arXiv, ``doi:…`` or the venue stands for the ID, and ``;`` separates two
papers. ``entries`` pairs each of them with the function it describes, a test that names
that function, and the configs and notebooks that use it, or else the field that chooses
it. What was reproduced is said where it is checked: in the test's mark
``published("…")``, or in ``results/verdicts.csv``, where a study compared methods. A
method without a test of its own is an error, so nothing is listed that was not checked.

    python -m sparsejax.papers [--family=moe] [--search=routing] [--write]
"""

import argparse
import ast
import csv
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparsejax.citations import Citation, parse, source_lines

ROOT = Path(__file__).parents[1]
PAGE = "docs/papers.md"

# Fields of a config that choose by name, for each table of names.
FIELDS = {
    "ACTIVATIONS": "model.ffn.activation",
    "ALLOCATIONS": "masked.allocation",
    "CRITERIA": "masked.criterion",
    "DISPATCHERS": "model.ffn.dispatcher",
    "ESTIMATORS": "masked.estimator",
    "EXCHANGES": "model.ffn.exchange",
    "HIDDEN": "model.ffn.activation",
    "MEMORIES": "model.memory.kind",
    "METHODS": "model.attention.selector",
    "PATTERNS": "model.attention.pattern",
    "PRIORITIES": "model.ffn.capacity_priority",
    "ROUTERS": "model.ffn.router",
    "SELECTORS": "model.attention.selector",
    "STRUCTURES": "masked.structure",
    "TABLES": "model.ffn.table",
    "UPDATERS": "masked.updater",
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Entry(NamedTuple):
    """One row of the table: a paper and the code that follows it."""

    citation: Citation
    module: str
    name: str  # of the function or class; empty for a whole module
    test: str  # "tests/moe/test_routers.py::test_…", or empty
    users: tuple[str, ...]  # configs and notebooks, or the field that chooses it
    status: str  # "verified", "tested" or "missing"
    reproduced: str  # what of the paper a test or a study finds again, or empty

    @property
    def family(self) -> str:
        """The part of sparsejax that the method is in, or ``pallas_kernels``."""
        return _part(self.module)


class Test(NamedTuple):
    """A test function: what it names itself, and what it names through helpers."""

    where: str
    direct: frozenset[str]
    indirect: frozenset[str]
    imports: frozenset[str]
    published: str  # what it reproduces, or empty


def entries(root: Path = ROOT) -> list[Entry]:
    """Collect every method of a checkout, sorted by family, year and authors."""
    tests = [
        t for path in sorted(root.glob("tests/**/test_*.py")) for t in _tests(path)
    ]
    users = _users(root)
    studied, found = _studied(root), []
    for package in ("sparsejax", "pallas_kernels"):
        for path in sorted((root / package).rglob("*.py")):
            found += _of_module(path, root, tests, users, studied)
    return sorted(found, key=lambda e: (e.family, e.citation.year, e.citation, e.name))


def markdown(rows: list[Entry]) -> str:
    """Write the table as a page."""
    count = len({row.citation.identifier for row in rows})
    text = [
        "# Papers",
        "",
        "Written by `make papers` from the `Source:` lines of the code.",
        f"{count} papers, {len(rows)} methods.",
        "`tested`: agrees with an oracle of ours. `verified`: a test also reproduces a",
        "number or an ordering that the paper prints; the last column says which.",
        "Claims are those of [a study of ours](masked.md); the page has each one.",
        "Where no config or notebook uses a method, its field does:",
        "`python train.py --config=… --config.FIELD=NAME`.",
    ]
    for family in dict.fromkeys(row.family for row in rows):
        text += ["", f"## {family}", ""]
        text += ["| paper | function | config | its own test | status | reproduced |"]
        text += ["|---|---|---|---|---|---|"]
        text += [_row(row) for row in rows if row.family == family]
    return "\n".join(text) + "\n"


def _row(row: Entry) -> str:
    module = row.module.removeprefix("sparsejax.")
    function = f"{module}.{row.name}" if row.name else module
    test = row.test.rpartition("::")[2]
    users = ", ".join(f"`{u if '=' in u else Path(u).stem}`" for u in row.users[:3])
    paper = f"{row.citation.link}, {row.citation.place}".replace("|", "\\|")
    cells = (paper, f"`{function}`", users, f"`{test}`", row.status, row.reproduced)
    return f"| {' | '.join(cells)} |"


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(module: str) -> str:
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "sparsejax" and rest else package


def _words(node: ast.AST) -> set[str]:
    """Every identifier and every one-word string under a node."""
    words = set()
    for n in ast.walk(node):
        words |= {getattr(n, key, None) for key in ("id", "attr", "arg")}
        if isinstance(n, ast.Constant) and isinstance(n.value, str):
            words.add(n.value)
    return {w for w in words if isinstance(w, str)}


def _definitions(tree: ast.Module) -> dict[str, set[str]]:
    """Words under each name that a file defines at its top level."""
    found = {}
    for node in tree.body:
        if isinstance(node, _Function | ast.ClassDef):
            found[node.name] = _words(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            found.update(dict.fromkeys(names, _words(node)))
    return found


def _closure(words: set[str], definitions: dict[str, set[str]]) -> set[str]:
    """The words, and those of every definition that they lead to."""
    reached, frontier = set(words), set(words)
    while frontier:
        frontier = {w for f in frontier for w in definitions.get(f, ())} - reached
        reached |= frontier
    return reached


def _imports(tree: ast.Module) -> frozenset[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(found)


def _tests(path: Path) -> Iterator[Test]:
    tree = _tree(path)
    definitions, imports = _definitions(tree), _imports(tree)
    for node in tree.body:
        if isinstance(node, _Function) and node.name.startswith("test_"):
            direct = definitions[node.name]
            published = (_published(d) for d in node.decorator_list)
            yield Test(
                where=f"{path.as_posix()}::{node.name}",
                direct=frozenset(direct),
                indirect=frozenset(_closure(direct, definitions)),
                imports=imports,
                published=next(filter(None, published), ""),
            )


def _published(decorator: ast.expr) -> str:
    """What ``@pytest.mark.published("…")`` says."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(
        ".published"
    ):
        return ast.literal_eval(decorator.args[0])
    return ""


def _users(root: Path) -> dict[str, set[str]]:
    """What every config and notebook chooses by name or imports, by path."""
    found = {}
    for path in sorted(root.glob("configs/*.py")):
        nodes = list(ast.walk(_tree(path)))
        keys = {id(k) for n in nodes if isinstance(n, ast.Dict) for k in n.keys}
        strings = (getattr(n, "value", None) for n in nodes if id(n) not in keys)
        chosen = {x for x in strings if isinstance(x, str)}
        found[path.relative_to(root).as_posix()] = chosen
    for path in sorted(root.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        found[path.relative_to(root).as_posix()] = _named(ast.parse("\n".join(code)))
    return found


def _named(tree: ast.Module) -> set[str]:
    """Strings, and what is imported, as ``part.name``: two parts may share a name."""
    words = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Constant) and isinstance(n.value, str):
            words.add(n.value)
        elif isinstance(n, ast.ImportFrom) and n.module:
            words |= {f"{_part(n.module)}.{a.name}" for a in n.names}
    return words


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Docstrings under the name of the top-level function or class they are in."""
    yield "", ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, _Function | ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, _Function | ast.ClassDef):
                    yield node.name, ast.get_docstring(inner) or ""


def _studied(root: Path) -> dict[str, str]:
    """How a study's claims about each method came out, by the key that chooses it."""
    path, found = root / "results" / "verdicts.csv", {}
    rows = [*csv.DictReader(path.read_text().splitlines())] if path.is_file() else []
    for method in {row["method"] for row in rows}:
        own = [row["verdict"] for row in rows if row["method"] == method]
        counts = (f"{own.count(v)} {v}" for v in dict.fromkeys(sorted(own)))
        found[f"masked.{method}"] = f"{len(own)} claims: {', '.join(counts)}"
    return found


def _of_module(
    path: Path,
    root: Path,
    tests: list[Test],
    users: dict[str, set[str]],
    studied: dict[str, str],
) -> Iterator[Entry]:
    module, tree = _module_name(path, root), _tree(path)
    near = [t for t in tests if _mirrors(t, module)]
    for name, docstring in _docstrings(tree):
        lines = source_lines(docstring)
        if not lines:
            continue
        chosen = _chosen(name, path, tree) if name else {}
        names = {*_names(name, tree), *chosen.values()}
        words = {f"{_part(module)}.{n}" for n in names} | {*chosen.values()}
        own = _ranked(names, near, module)
        if not any(f"/tests/{_part(module)}/" in t.where for t in own):
            own = _ranked(_users_of(name, tree), near, module) or own
        used = tuple(user for user, said in users.items() if words & said)
        fields = (f"{FIELDS[t]}={key}" for t, key in chosen.items() if t in FIELDS)
        claims = (studied.get(f"{_part(module)}.{key}", "") for key in chosen.values())
        reproduced = [own[0].published if own else "", *claims]
        for citation in (c for line in lines for c in parse(line)):
            yield Entry(
                citation=citation,
                module=module,
                name=name,
                test=own[0].where.removeprefix(f"{root.as_posix()}/") if own else "",
                users=used or tuple(fields)[:1],
                status=_status(own),
                reproduced="; ".join(dict.fromkeys(filter(None, reproduced))),
            )


def _status(own: list[Test]) -> str:
    if not own:
        return "missing"
    return "verified" if own[0].published else "tested"


def _mirrors(test: Test, module: str) -> bool:
    """Whether a test's file imports from the part of the package a module is in."""
    return _imported(test.imports, ".".join(module.split(".")[:2]))


@functools.cache
def _imported(imports: frozenset[str], part: str) -> bool:
    return any(f"{i}.".startswith(f"{part}.") for i in imports)


def _names(name: str, tree: ast.Module) -> set[str]:
    """A function's name and, if private, its users; a module's public names."""
    return {name} if name and not name.startswith("_") else _users_of(name, tree)


def _users_of(name: str, tree: ast.Module) -> set[str]:
    """What of a module leads to a name, and is public; all of it for no name."""
    words = _definitions(tree)
    reach = {d for d, w in words.items() if not name or name in _closure(w, words)}
    return {d for d in {name, *reach} - {""} if d == name or not d.startswith("_")}


def _chosen(name: str, path: Path, tree: ast.Module) -> dict[str, str]:
    """The key under which dicts beside a function have it, by the dict's name."""
    found = {}
    beside = [path.parent / "config.py", path.parent / "__init__.py"]
    for node in (
        n for t in [tree, *(_tree(p) for p in beside if p.is_file())] for n in t.body
    ):
        table = getattr(node, "value", None)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(table, ast.Dict) and isinstance(targets[0], ast.Name):
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Constant) and name in _words(value):
                    found[targets[0].id] = str(key.value)
    return found


def _ranked(names: set[str], tests: list[Test], module: str) -> list[Test]:
    """Tests that name a function: in their name, in their body, through a helper.

    First what reproduces a paper, then the family's folder, there the module's file.
    """
    spellings = [f"_{s}_" for n in names for s in (_snake(n), n.lower())]
    spelled = [t for t in tests if any(s in f"{_title(t)}_" for s in spellings)]
    ranks = [
        [t for t in spelled if names & t.indirect],
        [t for t in tests if names & t.direct],
        [t for t in tests if names & t.indirect],
    ]
    file, folder = f"/test_{module.rpartition('.')[2]}.py::", f"/tests/{_part(module)}/"
    found = {}
    for number, test in ((n, t) for n, rank in enumerate(ranks) for t in rank):
        near = (folder not in test.where, number, file not in test.where)
        found.setdefault(test, (not test.published, *near))
    return sorted(found, key=found.__getitem__)


def _title(test: Test) -> str:
    return test.where.rpartition("::")[2]


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip("_")).lower()


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or write it to the page."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.papers")
    parser.add_argument("--family", default="", help="only this part of the package")
    parser.add_argument("--search", default="", help="only rows with this text")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    flags = parser.parse_args(arguments)
    rows = entries()
    missing = [f"{r.module}.{r.name}" for r in rows if not r.test]
    if missing:
        print(f"no test names: {', '.join(missing)}", file=sys.stderr)
        return 1
    if flags.write:
        (ROOT / PAGE).write_text(markdown(rows))
    for row in rows:
        line = _row(row).strip("| ")
        if flags.family in ("", row.family) and flags.search.lower() in line.lower():
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
