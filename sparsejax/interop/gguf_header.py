"""What a GGUF file says before its numbers: fields by name, and where each tensor is.

A header is counts, fields (a name, a kind, a value) and tensors (a name, a shape from
the fastest axis on, a kind, a place), all in the byte order of the machine that wrote
it; only little-endian files are read.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

__all__ = ["Entry", "Header", "read_header"]

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # where general.alignment does not say otherwise
LONGEST = 1 << 28  # bytes or members of one value; more is a broken file


class Entry(NamedTuple):
    """A tensor in the file."""

    shape: tuple[int, ...]
    kind: int  # how its numbers are packed
    start: int  # first byte


class Header(NamedTuple):
    """All that stands before the numbers."""

    fields: dict[str, Any]
    tensors: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Read a header.

    Raises:
        ValueError: if it is none, or not whole.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"does not begin with {MAGIC!r}")
        if (version := _number(file, "I")) not in VERSIONS:
            raise ValueError(f"version {version}; readable are {VERSIONS}")
        tensors, fields = _number(file, "Q"), _number(file, "Q")
        about = {_text(file): _value(file, _number(file, "I")) for _ in range(fields)}
        entries = [(_text(file), _entry(file)) for _ in range(tensors)]
        unit = about.get("general.alignment", ALIGNMENT)
        first = -(-file.tell() // unit) * unit
    found = {name: x._replace(start=first + x.start) for name, x in entries}
    return Header(about, found)


def _entry(file: BinaryIO) -> Entry:
    axes = _number(file, "I")
    shape = [_number(file, "Q") for _ in range(axes)]
    return Entry(tuple(shape[::-1]), _number(file, "I"), _number(file, "Q"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _text(file)
    if kind == ARRAY:
        kind, count = _number(file, "I"), _number(file, "Q")
        if kind in SCALARS:
            return [*_numbers(file, SCALARS[kind], count)]
        return [_value(file, kind) for _ in range(_sane(count))]
    if kind not in SCALARS:
        raise ValueError(f"a value of the unknown kind {kind}")
    return _number(file, SCALARS[kind])


def _text(file: BinaryIO) -> str:
    size = _sane(_number(file, "Q"))
    return str(_bytes(file, size), "utf-8")


def _number(file: BinaryIO, letter: str) -> Any:
    return _numbers(file, letter, 1)[0]


def _numbers(file: BinaryIO, letter: str, count: int) -> tuple[Any, ...]:
    form = f"<{_sane(count)}{letter}"
    return struct.unpack(form, _bytes(file, struct.calcsize(form)))


def _bytes(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) != size:
        raise ValueError("ends within its header")
    return found


def _sane(count: int) -> int:
    if count > LONGEST:
        raise ValueError(f"a value of {count} bytes or members")
    return count
