"""The site: all pages are reached, links lead somewhere, docstrings are well formed."""

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys

import docutils.core
import pytest
from sphinx.ext.napoleon import Config, GoogleDocstring

from sparsejax.bench.__main__ import BENCHES
from sparsejax.config import convert, override, read
from sparsejax.train.config import Config as Trained
from tests.sources import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FAMILIES = ("attention", "routers", "memory", "masked", "scaling")


def module(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


conf, reference = module("conf"), module("reference")
every_package = pytest.mark.parametrize("package", reference.PACKAGES)


def anchors(page):
    """Headings of a page as GitHub and the site spell them in addresses."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_the_table_of_contents_names_every_page_once():
    named = [page for pages in conf.NAV.values() for page in pages]
    there = {p.relative_to(DOCS).with_suffix("").as_posix() for p in PAGES} - {"index"}
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_link_to_a_heading_finds_it(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text())
    targets = [(page.parent / path if path else page, name) for path, name in links]
    assert [(t.name, n) for t, n in targets if n not in anchors(t)] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda x: x.name)
def test_the_training_commands_of_a_page_are_legal(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^python train\.py (--config=[^#\n]*)", text, re.M):
        path, *flags = shlex.split(line)
        values = read(ROOT / path.removeprefix("--config="))
        for flag in flags:
            name, _, value = flag.removeprefix("--config.").partition("=")
            if flag.startswith("--config."):
                override(Trained, values, name, value)
        convert(Trained, values)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_of_a_family_has_a_figure(family):
    assert re.search(
        r"^!\[[^]]+\]\(.*\.png\)", (DOCS / f"{family}.md").read_text(), re.M
    )


def test_every_figure_has_a_function_and_is_shown_somewhere():
    table = (DOCS / "figures.py").read_text().partition("\nFIGURES")[2]
    functions = re.findall(r'^    "(\w+)": \w+,$', table, re.M)
    drawn = {p.name for p in (DOCS / "figures").iterdir()}
    assert drawn == {f"{name}.png" for name in functions}
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in drawn if f"(figures/{name})" not in text] == []


def test_every_file_of_results_is_made_by_what_its_name_says_or_the_page_tells():
    page = (DOCS / "reproducing.md").read_text()
    told = re.findall(r"^\| \[([\w.]+)\].* \| `python (.*?)`", page, re.M)
    for path in sorted((ROOT / "results").glob("*.csv")):
        sweep = ROOT / "configs" / "sweeps" / f"{path.stem}.py"
        by_name = path.stem in BENCHES or sweep.is_file()
        assert by_name or path.name in dict(told), path.name
    for name, command in told:
        assert (ROOT / "results" / name).is_file()
        kind, _, rest = command.partition(" ")
        made = (
            importlib.util.find_spec(rest.split()[0]) if kind == "-m" else ROOT / kind
        )
        assert made, command
        assert kind == "-m" or made.is_file(), command


@every_package
def test_the_reference_has_every_public_name(package):
    found = importlib.import_module(f"sparsejax.{package}")
    text = reference.markdown(found.__name__)
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert re.search(rf"^\.\. auto\w+:: \S*\b{name}$", text, re.M), name
        elif isinstance(value, dict):
            assert f"### {name}\n" in text
            assert all(f"`{key}`" in text for key in value)


@every_package
def test_docstrings_in_the_reference_are_well_formed(package):
    text = reference.markdown(f"sparsejax.{package}")
    options = Config(napoleon_use_ivar=conf.napoleon_use_ivar)
    for path in re.findall(r"^\.\. auto(?:function|class):: (\S+)", text, re.M):
        where, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(where), name)
        members = vars(value).items() if inspect.isclass(value) else ()
        public = [m for n, m in members if n[0] != "_" and inspect.isroutine(m)]
        for each in (value, *public):
            said = GoogleDocstring(inspect.getdoc(each) or "", options).lines()
            # Level 2 is a warning, as which the site would end.
            settings = {"report_level": 2, "halt_level": 2, "warning_stream": False}
            docutils.core.publish_doctree("\n".join(said), settings_overrides=settings)


def test_nothing_that_the_theme_would_fetch_is_asked_for():
    options = vars(conf)
    assert options["html_theme"] == "furo"
    assert options["extensions"] == [
        "myst_parser",
        "sphinx.ext.autodoc",
        "sphinx.ext.napoleon",
    ]


@pytest.mark.slow  # imports every package and writes forty pages: a quarter of a minute
def test_the_site_is_made_without_a_warning_and_asks_for_nothing_outside(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going"]
    made = subprocess.run(
        [*command, "-d", f"{tmp_path}/read", str(DOCS), f"{tmp_path}/site"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert made.returncode == 0, made.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    asked = r'<(?:script|img)[^>]*src="(?:https?:)?//|<link[^>]*href="(?:https?:)?//'
    assert [page.name for page in pages if re.search(asked, page.read_text())] == []
    shown = r'(?:src|href)="(?!https?:|#|mailto:)([^"#?]+)'
    for page in pages:
        links = re.findall(shown, page.read_text())
        assert [x for x in links if not (page.parent / x).exists()] == []
