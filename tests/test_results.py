"""Tables in documents that are said to be from results/ are what its rows say."""

import csv
import re

import pytest

from sparsejax.bench import (
    claims,
    comparison,
    facts,
    flips,
    forgetting,
    frontier,
    routers,
    selectors,
)
from sparsejax.bench.table import read_rows
from tests.sources import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = r"<!-- from results/(\w+)\.csv -->\n\n(.*?)\n\n<!-- end -->"
NUMBER = r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])"
# Tables that sum rows up have the function that writes them; in others a line is a row.
SUMMARIES = {
    "claims": claims.table,
    "comparison": comparison.table,
    "facts": facts.table,
    "forgetting": forgetting.table,
    "flips": flips.table,
    "frontier": frontier.losses,
    "frontier_fits": frontier.fits_table,
    "frontier_predicted": frontier.predicted_table,
    "routers": routers.table,
    "selectors": selectors.summary,
}


def marked():
    for page in PAGES:
        for name, table in re.findall(MARKED, page.read_text(), re.DOTALL):
            yield pytest.param(name, table, id=f"{page.stem}-{name}")


def numbers(row):
    found = []
    for value in row.values():
        try:
            found.append(float(value))
        except ValueError:
            continue
    return found


def tells(cell, row):
    """Whether a row has all that a cell says: its numbers, rounded, and its words."""
    if cell in row.values():
        return True
    said = re.findall(NUMBER, cell)
    shares = [100] * ("%" in cell) or [1]
    known = [x * share for x in numbers(row) for share in shares]
    for text in said:
        digits = len(text.partition("e")[0].partition(".")[2])
        wanted = float(text.replace(",", ""))
        if not any(round(x, digits) == wanted or x == wanted for x in known):
            return False
    words = re.sub(NUMBER, "", cell).strip(" `,%")
    return bool(said) and (not words or words in row.values())


def test_a_cell_is_told_apart_from_what_a_row_does_not_say():
    row = {"live": "0.508", "work": "causal", "ms": "4.756"}
    assert tells("causal, 51%", row)
    assert tells("4.76", row)
    assert not tells("4.75", row)
    assert not tells("causal, 52%", row)
    assert not tells("window, 51%", row)
    assert not tells("", row)


def test_the_tables_of_results_are_marked_as_such():
    names = {parameter.values[0] for parameter in marked()}
    assert names >= {
        "aot",
        "attention_gpu",
        "comparison",
        "frontier",
        "memory",
        "selectors",
    }


@pytest.mark.parametrize(("name", "table"), list(marked()))
def test_a_marked_table_says_what_its_rows_say(name, table):
    rows = read_rows(name)
    assert rows
    if name in SUMMARIES:
        assert table == SUMMARIES[name](rows)
        return
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        told = [all(tells(cell, row) for cell in cells if cell) for row in rows]
        assert any(told), line
    assert len(table.splitlines()) - 2 == len(rows)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("*.csv")), ids=lambda p: p.stem
)
def test_a_row_says_where_it_comes_from(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", row["commit"])
        assert all(row[name] for name in ("date", "machine", "python", "jax"))
