"""The table of papers: what is read, what is matched, and that it is never stale."""

import json

import pytest

from sparsejax import papers
from sparsejax.citations import Citation
from sparsejax.config import override, read
from sparsejax.train.config import Config
from tests.sources import ROOT

EVCI = "Evci et al. 2019, arXiv:1911.11134, Alg. 1"


@pytest.mark.parametrize(
    ("line", "citation"),
    [
        (EVCI, ("Evci et al.", "2019", "arXiv:1911.11134", "Alg. 1")),
        (
            "Zhu and Gupta 2017, arXiv:1710.01878, Eq. 1, Sec. 3",
            ("Zhu and Gupta", "2017", "arXiv:1710.01878", "Eq. 1, Sec. 3"),
        ),
        (
            "Jacobs et al. 1991, doi:10.1162/neco.1991.3.1.79, Eq. 1",
            ("Jacobs et al.", "1991", "doi:10.1162/neco.1991.3.1.79", "Eq. 1"),
        ),
        (
            "LeCun et al. 1989, NIPS, Sec. 2",
            ("LeCun et al.", "1989", "NIPS", "Sec. 2"),
        ),
        (
            "Baeza 1999, arXiv:cs/0701001, Sec. 2",
            ("Baeza", "1999", "arXiv:cs/0701001", "Sec. 2"),
        ),
    ],
)
def test_parse_reads_authors_year_paper_and_place(line, citation):
    assert papers.parse(line) == [Citation(*citation)]


def test_parse_reads_two_papers_on_one_line():
    found = papers.parse(f"{EVCI}; Mocanu et al. 2018, arXiv:1707.04780, Alg. 1; 2")
    assert [(c.year, c.place) for c in found] == [
        ("2019", "Alg. 1"),
        ("2018", "Alg. 1; 2"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Evci et al., arXiv:1911.11134, Alg. 1",
        "Evci et al. 2019, Alg. 1",
        "Evci et al. 2019, arXiv:1911.11134",
        "Evci et al. 2019, arXiv:1911.1, Alg. 1",
        "Evci et al. 2019, arxiv 1911.11134, Alg. 1",
        "Evci et al. 2019, doi:11134, Alg. 1",
        "2019, arXiv:1911.11134, Alg. 1",
    ],
)
def test_parse_refuses_anything_else(line):
    with pytest.raises(ValueError, match="is not 'Authors Year, arXiv:ID, place'"):
        papers.parse(line)


@pytest.mark.parametrize(
    ("docstring", "lines"),
    [
        (f"Grow.\n\nSource: {EVCI}.\n", [EVCI]),
        (f"Grow.\n\nSource: {EVCI}. Departure: no\n    decay.\n", [EVCI]),
        (f"Grow.\n\nSource: {EVCI}.\nDeparture: no decay.\n", [EVCI]),
        ("Source: Evci et al. 2019,\n    arXiv:1911.11134, Alg. 1", [EVCI]),
        (f"Source: {EVCI}\nSource: {EVCI}\n\nArgs:\n    x: y", [EVCI, EVCI]),
        ("It names its Source: elsewhere.", []),
    ],
)
def test_source_lines_joins_what_is_wrapped_and_ends_at_the_next_heading(
    docstring, lines
):
    assert papers.source_lines(docstring) == lines


@pytest.mark.parametrize(
    ("identifier", "link"),
    [
        ("arXiv:1911.11134", "[A 2019](https://arxiv.org/abs/1911.11134)"),
        ("doi:10.1/x", "[A 2019](https://doi.org/10.1/x)"),
        ("NIPS", "A 2019, NIPS"),
    ],
)
def test_a_citation_links_to_the_paper_where_it_has_an_address(identifier, link):
    assert Citation("A", "2019", identifier, "Eq. 1").link == link


SWITCH = '''
"""Routers."""

def switch(x):
    """Route.

    Source: Fedus et al. 2021, arXiv:2101.03961, Eq. 1.
    """
    return _jitter(x)

def _jitter(x):
    """Shake.

    Source: Fedus et al. 2021, arXiv:2101.03961, Sec. 2.2.
    """
    return x

class SwitchLayer:
    """A layer."""

    def __call__(self):
        """Call.

        Source: Fedus et al. 2021, arXiv:2101.03961, Fig. 2.
        """
'''
FILES = {
    "sparsejax/moe/__init__.py": '"""Moe."""\nROUTERS = {"top_one": switch}\n',
    "sparsejax/moe/routers.py": SWITCH,
    "pallas_kernels/__init__.py": '"""Kernels."""\n',
    "configs/moe.py": '"""A switch."""\nrouter = "top_one"\n',
    "configs/dense.py": '"""No switch."""\nrouter = None\n',
}
IMPORT = "from sparsejax.moe.routers import switch\n"


@pytest.fixture
def checkout(tmp_path):
    """Make a small repository; returns its entries, given one more file."""

    def entries(path, text):
        for name, content in {**FILES, path: text}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return {e.name: e for e in papers.entries(tmp_path)}

    return entries


@pytest.mark.parametrize(
    "body",
    [
        "def test_switch_takes_the_best(): f()",
        "def test_it(): assert switch(1)",
        "def test_it(): assert ROUTERS['top_one'](1)",
        "def run(): return switch(1)\ndef test_it(): assert run()",
        "CASES = {'a': switch}\ndef test_it(): assert CASES['a']",
    ],
)
def test_a_test_that_names_a_function_is_its_own(checkout, body):
    # A name in the title counts only where the body reaches the function too.
    body = body.replace("f()", "assert switch(2)")
    entry = checkout("tests/moe/test_routers.py", f"{IMPORT}{body}\n")["switch"]
    assert entry.test.startswith("tests/moe/test_routers.py::test_")
    assert entry.status == "tested"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tests/moe/test_routers.py", f"{IMPORT}def test_it(): assert 1\n"),
        ("tests/moe/test_routers.py", "def test_switch(): assert switch(1)\n"),
        ("tests/moe/routers.py", f"{IMPORT}def test_it(): assert switch(1)\n"),
        ("tests/moe/test_routers.py", f"{IMPORT}def check(): assert switch(1)\n"),
    ],
)
def test_a_function_that_no_test_of_its_family_names_is_missing(checkout, path, text):
    assert checkout(path, text)["switch"].status == "missing"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("switch", "test_switch_takes_the_best"),
        ("SwitchLayer", "test_a_switch_layer_works"),
        ("SwitchLayer", "test_a_switchlayer_works"),  # as MoE is no mo_e
    ],
)
def test_a_test_with_the_name_in_its_title_comes_first(name, title, checkout):
    text = (
        f"from sparsejax.moe.routers import {name}\n"
        f"def test_all(): assert {name}(1)\ndef {title}(): assert {name}(2)\n"
    )
    entry = checkout("tests/moe/test_routers.py", text)[name]
    assert entry.test.endswith(f"::{title}")


def test_a_private_function_is_tested_through_its_public_users(checkout):
    text = f"{IMPORT}def test_it(): assert switch(1)\n"
    entries = checkout("tests/moe/test_routers.py", text)
    assert entries["_jitter"].status == "tested"
    assert entries["SwitchLayer"].status == "missing"


def test_a_published_number_makes_a_method_verified(checkout):
    mark = '@pytest.mark.published("two thirds, within 1 %")\n'
    first = "def test_switch_takes_the_best(): assert switch(1)\n"
    text = f"{IMPORT}{first}{mark}def test_it(): assert switch(1)\n"
    entry = checkout("tests/moe/test_routers.py", text)["switch"]
    assert entry.test.endswith("::test_it")
    assert (entry.status, entry.reproduced) == ("verified", "two thirds, within 1 %")


def test_a_method_without_a_config_shows_the_field_that_chooses_it(checkout):
    names = '"""Moe."""\nROUTERS = {"best": switch}\n'
    entry = checkout("sparsejax/moe/__init__.py", names)["switch"]
    assert entry.users == ("model.ffn.router=best",)


def test_a_config_does_not_use_what_only_names_an_argument(checkout):
    text = '"""An argument."""\nrouter = {"switch": 4}\n'
    entry = checkout("configs/hash.py", text)["switch"]
    assert entry.users == ("configs/moe.py",)


def test_a_helper_is_tested_through_what_leads_to_it(checkout):
    folder = "tests/moe/test_routers.py"
    entry = checkout(folder, f"{IMPORT}def test_it(): assert switch(1)\n")["_jitter"]
    assert entry.test.endswith("::test_it")


@pytest.mark.parametrize("table", papers.FIELDS)
def test_a_field_that_chooses_by_name_is_a_field_of_a_config(table):
    field = papers.FIELDS[table]
    name = "memory" if ".memory." in field else "moe"
    override(Config, read(ROOT / "configs" / f"{name}.py"), field, "any")


def test_a_config_uses_what_it_names_outside_its_docstring(checkout):
    entry = checkout("tests/moe/test_routers.py", IMPORT)["switch"]
    assert entry.users == ("configs/moe.py",)


@pytest.mark.parametrize(
    ("code", "used"),
    [
        ("from sparsejax.moe import switch", True),
        ("from sparsejax.attention import switch", False),
        ("model.switch = x", False),
        ("layer = {'router': 'top_one'}", True),
    ],
)
def test_a_notebook_uses_what_its_code_imports_or_chooses(code, used, checkout):
    cells = [
        {"cell_type": "markdown", "source": ["from sparsejax.moe import SwitchLayer"]},
        {"cell_type": "code", "source": [code]},
    ]
    entries = checkout("notebooks/moe.ipynb", json.dumps({"cells": cells}))
    assert ("notebooks/moe.ipynb" in entries["switch"].users) == used
    assert entries["SwitchLayer"].users == ()


def test_a_source_line_that_does_not_parse_is_an_error(checkout):
    text = '"""More.\n\nSource: Fedus et al.\n"""\n'
    with pytest.raises(ValueError, match="Fedus"):
        checkout("sparsejax/moe/more.py", text)


@pytest.fixture(scope="module")
def ours():
    return papers.entries()


def test_every_listed_method_has_a_test_of_its_own(ours):
    assert [f"{e.module}.{e.name}" for e in ours if not e.test] == []


def test_the_page_is_what_the_code_says(ours):
    page = (ROOT / papers.PAGE).read_text()
    assert page == papers.markdown(ours), f"{papers.PAGE} is stale; run `make papers`"


@pytest.fixture
def one_entry(monkeypatch):
    """Let the command see one entry, with or without a test."""

    def replace(test):
        entry = papers.Entry(
            citation=papers.parse(EVCI)[0],
            module="sparsejax.masked.updaters",
            name="rigl",
            test=test,
            users=("configs/masked.py",),
            status="tested",
            reproduced="",
        )
        monkeypatch.setattr(papers, "entries", lambda: [entry])

    return replace


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([], True),
        (["--family=masked", "--search=RIGL"], True),
        (["--family=moe"], False),
        (["--search=switch"], False),
    ],
)
def test_the_command_filters_by_family_and_text(one_entry, capsys, flags, found):
    one_entry("tests/masked/test_updaters.py::test_rigl")
    assert papers.main(flags) == 0
    assert ("`masked.updaters.rigl`" in capsys.readouterr().out) == found


def test_the_command_writes_the_page(one_entry, monkeypatch, tmp_path, capsys):
    one_entry("tests/masked/test_updaters.py::test_rigl")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(papers, "ROOT", tmp_path)
    assert papers.main(["--write"]) == 0
    row = "| `masked.updaters.rigl` | `masked` | `test_rigl` | tested |  |"
    assert row in (tmp_path / papers.PAGE).read_text()


def test_the_command_refuses_a_method_without_a_test(one_entry, capsys):
    one_entry("")
    assert papers.main([]) == 1
    assert "no test names: sparsejax.masked.updaters.rigl" in capsys.readouterr().err
