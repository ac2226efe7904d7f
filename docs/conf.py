"""How Sphinx makes the site: `make docs`; nothing is fetched while it builds.

Pages are the Markdown files beside this one, as they are read in the repository. What
only the site has is added as they are read: the order of pages (``NAV``) to the first
one, what docstrings say to each page in ``api/`` (``reference.py``), and the documents
of the repository's root in the place of the two pages that lead to them.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

import sparsejax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import reference  # noqa: E402

project = "sparsejax"
author = "the sparsejax developers"
version = release = sparsejax.__version__

NAV = {
    "Start": ("tour", "papers", "reproducing"),
    "Families": (
        "attention",
        "routers",
        "moe",
        "memory",
        "masked",
        "block_sparse",
        "scaling",
    ),
    "Running": ("kernels", "sharding", "interop"),
    "Reference": tuple(f"api/{name}" for name in reference.PACKAGES),
    "Project": ("contributing", "changelog"),
}
ROOT_PAGES = {"contributing": "../CONTRIBUTING.md", "changelog": "../CHANGELOG.md"}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
suppress_warnings = ["config.cache"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "sparsejax"
html_copy_source = html_show_sourcelink = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"


def contents() -> str:
    """Write ``NAV`` as the hidden tables of contents of the first page."""
    table = "\n```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```\n"
    return "".join(table.format(name, "\n".join(pages)) for name, pages in NAV.items())


def as_read(_: Sphinx, page: str, source: list[str]) -> None:
    """Add what only the site has; lead its links to its own pages."""
    text = source[0]
    if page in ROOT_PAGES:
        text = (HERE / ROOT_PAGES[page]).read_text().replace("](docs/", "](")
    for name, path in ROOT_PAGES.items():
        text = text.replace(f"]({path})", f"]({name}.md)")
    if page == "index":
        text += contents()
    if page.startswith("api/"):
        text += reference.markdown(f"sparsejax.{page.removeprefix('api/')}")
    source[0] = text


def setup(app: Sphinx) -> None:
    """Register what happens as pages are read."""
    app.connect("source-read", as_read)
    app.connect("autodoc-skip-member", reference.skipped)
    app.connect("autodoc-process-docstring", reference.linked)
    app.connect("autodoc-process-signature", reference.signature)
