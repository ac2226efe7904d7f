"""Read compiled programs: how many bytes each kind of collective moves."""

import functools
import math
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
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)|(?:true|false)_computation=%?([\w.\-]+)"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count[^}]*"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


Moved = dict[tuple[str, str], int]  # kind, and chain if it has one → bytes


class _Computation(NamedTuple):
    moved: Moved  # of its own instructions
    calls: list[tuple[str, int]]  # computation → how often
    choices: list[list[str]]  # of each conditional
    constants: list[int]


def _bytes(dtype: str, shape: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype, int(digits[0]) if digits else 32)
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _sizes(text: str, *, scalars: bool = True) -> list[int]:
    """Give the bytes of each array in a result's type."""
    return [_bytes(*a) for a in _ARRAY.findall(text) if scalars or a[1]]


def _moved(line: str, found: re.Match, types: dict[str, str]) -> int:
    """Give the bytes of a collective's result, or of its operand if that is ragged.

    One end of a ragged collective is the rows there are, the other the room for more.
    """
    kind, started = found.groups()
    result = line[: found.start()].partition("=")[2]
    if kind == "ragged-all-to-all":
        operand = _OPERAND.match(line, found.end())
        ends = _sizes(result)[:2] if started else _sizes(result)
        if operand and not started:
            ends.append(sum(_sizes(types.get(operand[1], ""))))
        return min(filter(None, ends), default=0)
    # Several results are moved together; a start gives its operands before them.
    parts = _sizes(result, scalars=not started)
    return sum(parts[len(parts) // 2 :] if started and kind != "all-reduce" else parts)


def _parse(text: str, scope: str) -> tuple[str, dict[str, _Computation]]:
    computations: dict[str, _Computation] = defaultdict(
        lambda: _Computation({}, [], [], [])
    )
    entry = name = ""
    trips: list[tuple[str, str, str, str]] = []
    types: dict[str, str] = {}
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
        branches = _BRANCHES.findall(line)
        if branches:
            names = (name for pair in branches for name in pair)
            here.choices.append(_OPERAND.findall(" ".join(names)))
        named = _NAME.match(line)
        if named:
            types[named[1]] = line[named.end() :].partition("(")[0]
        found = _COLLECTIVE.search(line)
        source = _SOURCE.search(line)
        if found and scope in (source[1] if source else ""):
            chain = _CHAIN.search(line)
            which = found[1], chain[1] if chain else ""
            _add(here.moved, which, _moved(line, found, types))
        here.calls.extend((callee, 1) for callee in _CALLED.findall(line))
    for caller, condition, body, line in trips:
        known = _TRIPS.search(line)
        bound = max(computations[condition].constants, default=1)
        count = int(known[1]) if known else bound
        computations[caller].calls.append((body, count))
    return entry, computations


def _add(moved: Moved, which: tuple[str, str], size: int) -> None:
    """Add what was moved, unless it is another part of the same chain."""
    before = moved.get(which, 0)
    moved[which] = max(before, size) if which[1] else before + size


def collective_bytes(text: str, scope: str = "") -> dict[str, int]:
    """Sum, by kind, the bytes of collectives' results on one chip in one execution.

    A ragged collective counts the smaller of its operand and its result. Loops count as
    often as they run; a loop whose bound is not a constant counts once. Of conditionals
    the branch that moves most counts. What a TPU does in parts, each fused with some
    other work, is one chain and counts once.

    Args:
        text: of a compiled module, ``compiled.as_text()``.
        scope: counts only what was traced under this ``jax.named_scope``.
    """
    entry, computations = _parse(text, scope)

    @functools.cache
    def total(name: str) -> Moved:
        here = computations[name]
        moved = dict(here.moved)
        most = (
            max(c, key=lambda name: sum(total(name).values())) for c in here.choices
        )
        for callee, count in (*here.calls, *((name, 1) for name in most)):
            if callee in computations:
                for which, size in total(callee).items():
                    _add(moved, which, count * size)
        return moved

    found: Counter = Counter()
    for (kind, _), size in total(entry).items():
        found[kind] += size
    return dict(found)
