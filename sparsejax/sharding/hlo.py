"""Read compiled programs: how many bytes each kind of collective moves."""

import re
from collections import Counter, defaultdict
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
BITS = {"pred": 8, "bf16": 16, "f16": 16, "tf32": 32, "s4": 4, "u4": 4}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=\{?%?([\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count[^}]*"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


class _Computation(NamedTuple):
    moved: Counter  # kind → bytes, of its own instructions
    calls: list[tuple[str, int]]  # computation → how often
    constants: list[int]


def _sizes(text: str) -> list[int]:
    """Give the bytes of each array in a result's type."""

    def size(dtype: str, shape: str) -> int:
        digits = re.search(r"\d+", dtype)
        bits = BITS.get(dtype, int(digits[0]) if digits else 32)
        count = 1
        for extent in filter(None, shape.split(",")):
            count *= int(extent)
        return count * bits // 8

    return [size(*array) for array in _ARRAY.findall(text)]


def _moved(line: str, found: re.Match, sizes: dict[str, int]) -> int:
    """Give the bytes of a collective's result, or of its operand if that is ragged.

    One end of a ragged collective is the rows there are, the other the room for more.
    """
    parts = _sizes(line[: found.start()].partition("=")[2])
    # Several results are moved together; a start's results hold its operands too.
    size = max(parts, default=0) if found[2] else sum(parts)
    if found[1] != "ragged-all-to-all":
        return size
    operand = _OPERAND.match(line, found.end())
    ends = parts[:2] if found[2] else [size, sizes.get(operand[1] if operand else "")]
    return min(filter(None, ends), default=0)


def _parse(text: str) -> tuple[str, dict[str, _Computation]]:
    computations: dict[str, _Computation] = defaultdict(
        lambda: _Computation(Counter(), [], [])
    )
    entry = name = ""
    trips: list[tuple[str, str, str, str]] = []
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        opening = _COMPUTATION.match(line)
        if opening:
            name = opening[2]
            entry = name if opening[1] else entry
            continue
        here = computations[name]
        here.constants.extend(int(x) for x in _CONSTANT.findall(line))
        loop = _WHILE.search(line)
        if loop:
            trips.append((name, loop[1], loop[2], line))
            continue
        named = _NAME.match(line)
        if named:
            sizes[named[1]] = sum(_sizes(line[named.end() :].partition("(")[0]))
        found = _COLLECTIVE.search(line)
        if found:
            here.moved[found[1]] += _moved(line, found, sizes)
        here.calls.extend((callee, 1) for callee in _CALLED.findall(line))
    for caller, condition, body, line in trips:
        known = _TRIPS.search(line)
        bound = max(computations[condition].constants, default=1)
        count = int(known[1]) if known else bound
        computations[caller].calls.append((body, count))
    return entry, computations


def collective_bytes(text: str) -> dict[str, int]:
    """Sum, by kind, the bytes of collectives' results on one chip in one execution.

    A ragged collective counts the smaller of its operand and its result. Loops count as
    often as they run; a loop whose bound is not a constant counts once.

    Args:
        text: of a compiled module, ``compiled.as_text()``.
    """
    entry, computations = _parse(text)

    def total(name: str) -> Counter:
        here = computations[name]
        moved = Counter(here.moved)
        for callee, count in here.calls:
            if callee in computations:
                for kind, size in total(callee).items():
                    moved[kind] += count * size
        return moved

    return dict(total(entry))
