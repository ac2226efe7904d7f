"""Citations in docstrings: ``Source: Authors Year, arXiv:ID, place``, read strictly."""

import re
from typing import NamedTuple

__all__ = ["Citation", "parse", "source_lines"]

_CITATION = re.compile(
    r"(?P<authors>[^\d,;][^;]*?) (?P<year>(?:19|20)\d\d)[a-z]?, "
    r"(?P<identifier>arXiv:\d{4}\.\d{4,5}|arXiv:[a-z-]+(?:\.[A-Z]{2})?/\d{7}"
    r"|doi:10\.\S+|(?!arXiv|doi)[A-Z][^,]*), (?P<place>\S.*)"
)


class Citation(NamedTuple):
    """Where a method was published, and where in that paper it stands."""

    authors: str
    year: str
    identifier: str  # arXiv:1911.11134, doi:10.1162/…, or a venue
    place: str

    @property
    def link(self) -> str:
        """Markdown: authors and year, leading to the paper where it has an address."""
        site, _, number = self.identifier.partition(":")
        site = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(site)
        text = f"{self.authors} {self.year}"
        return f"[{text}]({site}{number})" if site else f"{text}, {self.identifier}"


def source_lines(docstring: str) -> list[str]:
    """Give each ``Source:`` of a docstring as one line, its departures left out."""
    paragraph = r"^\s*Source: (.*?)(?=\n\s*\n|\n\s*[A-Z]\w*:|\Z)"
    found = re.findall(paragraph, docstring, flags=re.MULTILINE | re.DOTALL)
    lines = [" ".join(text.split()).split(" Departure:")[0] for text in found]
    return [line.removesuffix(".") for line in lines]


def parse(line: str) -> list[Citation]:
    """Read the citations of one source line.

    Raises:
        ValueError: if a part is not ``Authors Year, arXiv:ID, place``.
    """
    citations = []
    for part in re.split(r"; (?=[A-Z][^;]* (?:19|20)\d\d[a-z]?, )", line):
        match = _CITATION.fullmatch(part)
        if not match:
            raise ValueError(
                f"Source: {part!r} is not 'Authors Year, arXiv:ID, place'"
                " (or doi:… or a venue for the ID)"
            )
        citations.append(Citation(**match.groupdict()))
    return citations
