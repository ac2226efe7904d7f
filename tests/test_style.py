"""The rules of the house, as tests; each rule is first shown a file that breaks it.

A rule takes a source and yields its violations. Rules that need more than one file at a
time, such as imports, live in test files of their own.
"""

import ast
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsejax import papers
from sparsejax.typing import ALPHABET
from tests.sources import PACKAGES, ROOT, Source, snippet, sources

Function = ast.FunctionDef | ast.AsyncFunctionDef

LINES, FUNCTION_LINES, KERNEL_LINES, PARAMETERS = 400, 50, 120, 8
NAMELESS = {"utils", "common", "misc", "base", "helpers", "util", "helper"}
# Spelled so that this file does not contain the words itself.
UNFINISHED = re.compile(r"\b(TO[D]O|FIXM[E]|XX[X]|NotImplemented[E]rror)\b")
MACHINE = re.compile(
    r"(?<![\w.])/(?:home|root|work|Users)/(?!user\b)\w\w|(?<!\w)/tmp/[a-z]"
)
REGISTRY_HOST = re.compile(r"py(?:pi)\.org|python(?:hosted)\.|registry\.(?:npm)js")


def functions(source: Source) -> Iterator[Function]:
    return (n for n in ast.walk(source.tree) if isinstance(n, Function))


def long_files(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > LINES:
        yield f"{lines} lines; a file that needs more than {LINES} is two concepts"


def long_functions(source: Source) -> Iterator[str]:
    kernel = source.path.startswith("pallas_kernels")
    limit = KERNEL_LINES if kernel else FUNCTION_LINES
    for f in functions(source):
        lines = (f.end_lineno or f.lineno) - f.lineno + 1
        if lines > limit:
            yield f"{f.lineno}: {f.name} has {lines} lines; at most {limit}"


def many_parameters(source: Source) -> Iterator[str]:
    for f in () if source.path.startswith("tests") else functions(source):
        given = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        names = [a.arg for a in given if a.arg not in ("self", "cls")]
        excused = "noqa: PLR0913" in source.text.splitlines()[f.lineno - 1]
        if len(names) > PARAMETERS and not excused:
            yield f"{f.lineno}: {f.name} has {len(names)} parameters"


def nameless_files(source: Source) -> Iterator[str]:
    if Path(source.path).stem in NAMELESS:
        yield "a helper lives with its only user, or has a concept of its own"


def prints(source: Source) -> Iterator[str]:
    command = source.path == "train.py" or '__name__ == "__main__"' in source.text
    if command or source.path.startswith("sparsejax/bench/"):
        return
    for node in ast.walk(source.tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id == "print":
            yield f"{node.lineno}: print outside a command"


def unfinished(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if found := UNFINISHED.search(line):
            yield f"{number}: {found.group()}"


def registry_names(files: tuple[Source, ...]) -> set[str]:
    """Keys of the literal dicts of functions, named in capitals, at top level."""
    names = set()
    for node in (node for source in files for node in source.tree.body):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            table = node.value if isinstance(node.value, ast.Dict) else ast.Dict([], [])
            if isinstance(target, ast.Name) and target.id.isupper():
                names |= {
                    key.value
                    for key, value in zip(table.keys, table.values, strict=True)
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
                }
    return names


def branches_on_methods(source: Source, names: set[str] | None = None) -> Iterator[str]:
    names = registry_names(sources("sparsejax")) if names is None else names
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Compare) or source.path.startswith("tests"):
            continue
        sides = [getattr(x, "value", None) for x in (node.left, *node.comparators)]
        methods = [x for x in sides if isinstance(x, str) and x in names]
        if methods and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            yield f"{node.lineno}: compares with the method name {methods[0]!r}"


def undocumented(source: Source) -> Iterator[str]:
    if source.path.startswith(("tests", "configs")):
        return
    public = [n for n in source.tree.body if isinstance(n, Function | ast.ClassDef)]
    for node in [source.tree, *(n for n in public if not n.name.startswith("_"))]:
        if not ast.get_docstring(node):
            yield f"{getattr(node, 'name', 'the module')} has no docstring"


def citations(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            for line in papers.source_lines(ast.get_docstring(node) or ""):
                try:
                    papers.parse(line)
                except ValueError as error:
                    yield f"{getattr(node, 'lineno', 1)}: {error}"


def config_notes(source: Source) -> Iterator[str]:
    if not source.path.startswith("configs/") or source.path.endswith("__init__.py"):
        return
    note = ast.get_docstring(source.tree) or ""
    if f"--config={source.path}" not in note:
        yield f"its docstring lacks the command, with --config={source.path}"
    if not {"get_config", "get_sweep"} & {f.name for f in functions(source)}:
        yield "no get_config() and no get_sweep()"


def version_questions(source: Source) -> Iterator[str]:
    if source.path == "sparsejax/compat.py" or source.path.startswith("tests"):
        return
    for node in ast.walk(source.tree):
        words = {getattr(n, "attr", None) for n in ast.walk(node)}
        if isinstance(node, ast.Compare) and words & {
            "__version__",
            "__version_info__",
        }:
            yield f"{node.lineno}: only compat.py asks for a version"


def foreign_letters(source: Source) -> Iterator[str]:
    """Single letters in shapes come from the alphabet."""
    shaped = ("Float", "Int", "Bool", "Num", "Shaped", "Inexact", "Key", "UInt")
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Subscript) or source.path.startswith("tests"):
            continue
        if not isinstance(node.value, ast.Name) or node.value.id not in shaped:
            continue
        for text in (n for n in ast.walk(node.slice) if isinstance(n, ast.Constant)):
            letters = re.findall(r"(?<!\w)[A-Za-z](?!\w)", str(text.value))
            for letter in letters:
                if letter not in ALPHABET:
                    yield f"{node.lineno}: {letter!r} is not in typing.ALPHABET"


def terse_tests(source: Source) -> Iterator[str]:
    if not Path(source.path).name.startswith("test_"):
        return
    for f in functions(source):
        if f.name.startswith("test_") and len(f.name.split("_")) < 3:
            yield f"{f.lineno}: {f.name} is not a sentence"


# Each rule with a file that breaks it: where the file is, and what it says.
RULES = {
    long_files: ("sparsejax/a.py", "x = 1\n" * 401),
    long_functions: ("sparsejax/a.py", "def f():\n" + "  x = 1\n" * 50),
    many_parameters: ("sparsejax/a.py", "def f(a, b, c, d, e, *, f, g, h, i): 0"),
    nameless_files: ("sparsejax/moe/utils.py", ""),
    prints: ("sparsejax/a.py", "def f():\n  print(1)"),
    unfinished: ("sparsejax/a.py", "x = 1  # FIXM\x45"),
    branches_on_methods: ("sparsejax/a.py", "def f(n):\n  return n == 'magnitude'"),
    undocumented: ("sparsejax/a.py", '"""Module."""\ndef f(): return 1'),
    citations: ("sparsejax/a.py", '"""One.\n\nSource: Evci 2019, Alg. 1\n"""'),
    config_notes: ("configs/a.py", '"""A note."""\ndef get_config(): 0'),
    version_questions: ("sparsejax/a.py", "old = jax.__version_info__ < (1, 2)"),
    foreign_letters: ("sparsejax/a.py", "x: Float[Array, 'b y d']"),
    terse_tests: ("tests/test_a.py", "def test_bag(): assert f()"),
}
CODE = (*PACKAGES, "configs", "tests", "train.py", "sweep.py")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    found = [f"{s.path}: {v}" for s in sources(*CODE) for v in rule(s)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_a_file_that_breaks_it(rule):
    assert list(rule(snippet(*RULES[rule])))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (long_files, "sparsejax/a.py", "x = 1\n" * 400),
        (long_functions, "pallas_kernels/a.py", "def f():\n" + "  x = 1\n" * 119),
        (
            many_parameters,
            "sparsejax/a.py",
            "def f(self, a, b, c, d, *, e, f, g, h): 0",
        ),
        (prints, "sparsejax/a.py", 'print(1)\nif __name__ == "__main__": f()'),
        (branches_on_methods, "sparsejax/a.py", "x = METHODS['magnitude']"),
        (undocumented, "sparsejax/a.py", '"""Module."""\ndef _f(): return 1'),
        (citations, "sparsejax/a.py", '"""Source: A 2019, arXiv:1911.11134, Eq. 1."""'),
        (
            config_notes,
            "configs/a.py",
            '"""--config=configs/a.py"""\ndef get_config(): 0',
        ),
        (version_questions, "sparsejax/compat.py", "v = jax.__version_info__"),
        (foreign_letters, "sparsejax/a.py", "x: Float[Array, 'b #t *rest c/2 4 ...']"),
        (terse_tests, "tests/test_a.py", "def test_bag_reads_rows(): assert f()"),
    ],
)
def test_the_rule_passes_a_file_that_keeps_it(rule, path, text):
    assert list(rule(snippet(path, text))) == []


def tracked_text() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix not in (".png", ".npz", ".gz") and path.is_file():
            yield name, path.read_text()


def test_no_tracked_file_names_a_machine_or_a_registry():
    found = [
        f"{name}: {match.group()}"
        for name, text in tracked_text()
        for match in itertools.chain(
            MACHINE.finditer(text), REGISTRY_HOST.finditer(text)
        )
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE, "cd \x2fhome/ada/x"),
        (MACHINE, "open('\x2ftmp/data')"),
        (REGISTRY_HOST, "https://py\x70i.org/simple"),
    ],
)
def test_a_machine_or_registry_name_is_found(pattern, text):
    assert pattern.search(text)


@pytest.mark.parametrize("text", ["frame/work/x", "~/.cache", "a/b/tmp/c", "/ work"])
def test_an_innocent_path_is_not_found(text):
    assert not MACHINE.search(text)
