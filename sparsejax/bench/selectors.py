"""From which length on a selector beats reading everything, and what choosing costs.

    python -m sparsejax.bench selectors

Batch 1, 4 heads of 64, float32, blocks of 128, budgets of the papers where they fit.
Each row of ``results/selectors.csv`` is one method at one length beside dense causal
attention by XLA, in turns: the whole mixer, choosing included. ``crossover`` is the
shortest measured length from which on the method is always faster.
For MoBA, choosing is also timed alone, beside the attention over what it chose.
Rows of methods and lengths that are not asked for stay; what all of them say goes into
the table in ``docs/attention.md``.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.axes import Axes

from sparsejax.attention import (
    METHODS,
    AttentionConfig,
    Sizes,
    block_sparse_attention,
    causal,
)
from sparsejax.attention.context import Context
from sparsejax.attention.selectors import moba
from sparsejax.bench.attention import (
    BLOCK,
    HEADS,
    WIDTH,
    Work,
    dense,
    jax_runner,
    race,
    ratio,
)
from sparsejax.bench.table import (
    ROOT,
    markdown,
    provenance,
    read_rows,
    result,
    write_rows,
)
from sparsejax.train.plots import write_figure
from sparsejax.typing import Array

DOCUMENT = ROOT / "docs" / "attention.md"
SIZES = Sizes(HEADS * WIDTH, HEADS, HEADS, WIDTH)
COLUMNS = {
    "method": "method",
    "length": "length",
    "pass": "pass",
    "ours_ms": "ours, ms",
    "dense_ms": "dense XLA, ms",
    "dense_ratio": "times dense",
}
SUMMARY = {
    "method": "method",
    "forward": "faster forward from",
    "both": "forward + backward from",
    "longest": "longest measured",
    "ratio": "times dense there, forward + backward",
}
MARKS = "<!-- from results/selectors.csv -->\n", "<!-- end -->"
CHOOSING = {
    "work": "work",
    "attend_ms": "attention, ms",
    "choose_ms": "choosing, ms",
    "choose_ratio": "choosing over attention",
}


def mixer(method: str, length: int) -> Callable[..., Array]:
    """Give ``(q, k, v) -> values`` of a method with its default budget.

    Raises:
        ValueError: if the budget does not fit the length.
    """
    options = METHODS[method].options()
    config = AttentionConfig(
        selector=method,
        selection=dataclasses.asdict(options),
        block_q=BLOCK,
        block_kv=BLOCK,
        causal=METHODS[method].causal,
    )
    layer = METHODS[method].build(config, SIZES, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, length, SIZES.width))
    positions = jnp.arange(length, dtype="int32")[None]

    def attend(q: Array, k: Array, v: Array) -> Array:
        features = layer.features(x, positions)
        context = Context(config=config, positions=positions, features=features)
        return layer(q, k, v, x, context).values

    return attend


def rows_of(
    method: str, length: int, *, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure a method at a length, both passes; none if its budget does not fit."""
    found = []
    for backward in (False, True):
        work = Work(method, length, backward, causal())
        try:
            ours = jax_runner(mixer(method, length), work)
        except ValueError as error:
            sys.stderr.write(f"{method}, {length}: {error}\n")
            return []
        runners = {"ours": ours, "dense": jax_runner(dense(causal(), length), work)}
        times = race(runners, rounds=rounds, seconds=seconds)
        found.append(
            {
                "method": method,
                "length": str(length),
                "pass": work.passes,
                "ours_ms": milliseconds(times["ours"]),
                "dense_ms": milliseconds(times["dense"]),
                "dense_ratio": f"{ratio(times, 'dense', 'ours'):.3g}",
                "rounds": len(times["ours"]),
            }
        )
    return found


def choosing(length: int, top: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Time MoBA's choice, and the attention over what was chosen."""
    work = Work(f"MoBA, {top} blocks, {length}", length, False, causal())
    q, k, v = work.inputs()
    select = jax.jit(functools.partial(moba, block_kv=BLOCK, top=top))
    mask = select(q, k)
    attend = jax.jit(block_sparse_attention)
    runners = {
        "choose": lambda: jax.block_until_ready(select(q, k)),
        "attend": lambda: jax.block_until_ready(attend(q, k, v, mask)),
    }
    times = race(runners, rounds=rounds, seconds=seconds)
    return {
        "work": work.name,
        "attend_ms": milliseconds(times["attend"]),
        "choose_ms": milliseconds(times["choose"]),
        "choose_ratio": f"{ratio(times, 'choose', 'attend'):.3g}",
    }


def milliseconds(seconds: list[float]) -> str:
    """Give the median as text."""
    return f"{1e3 * statistics.median(seconds):.2f}"


def crossover(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Shortest length from which on all ratios are above 1; None if the last is not."""
    found = None
    for row in sorted(rows, key=lambda row: -int(row["length"])):
        if float(row["dense_ratio"]) <= 1:
            break
        found = int(row["length"])
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out, for each method, the crossovers and the ratio at the longest length."""
    found = []
    for method in sorted({row["method"] for row in rows}):
        own = sorted(of(rows, method=method), key=lambda row: int(row["length"]))
        both = of(own, **{"pass": "forward + backward"})
        forward = of(own, **{"pass": "forward"})
        found.append(
            {
                "method": f"`{method}`",
                "forward": crossover(forward) or "not yet",
                "both": crossover(both) or "not yet",
                "longest": both[-1]["length"],
                "ratio": both[-1]["dense_ratio"],
            }
        )
    return markdown(found, SUMMARY)


def of(rows: Sequence[Mapping[str, Any]], **values: str) -> list[Mapping[str, Any]]:
    """Give the rows with these values."""
    return [row for row in rows if all(row[k] == v for k, v in values.items())]


def summarise(document: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the summary between the document's marks."""
    head, begin, rest = document.read_text().partition(MARKS[0])
    _, end, tail = rest.partition(MARKS[1])
    document.write_text(f"{head}{begin}\n{summary(rows)}\n\n{end}{tail}")


def draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> Axes:
    """Draw how many times faster than dense each method is, over the length."""
    curves = defaultdict(list)
    for row in rows:
        if row["pass"] == "forward + backward":
            point = int(row["length"]), float(row["dense_ratio"])
            curves[row["method"]].append(point)
    for (method, points), marker in zip(curves.items(), itertools.cycle("osD^vP*X<")):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=method)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("length")
    axes.set_ylabel("times faster than dense, forward + backward")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def main(argv: list[str]) -> int:
    """Measure every method at every length; write the table and its picture."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench selectors")
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS))
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    flags = parser.parse_args(argv)
    pace = {"rounds": flags.rounds, "seconds": flags.seconds}
    about, asked = provenance(), set(itertools.product(flags.methods, flags.lengths))
    rows = [
        row
        for row in read_rows("selectors")
        if (row["method"], int(row["length"])) not in asked
    ]
    for method, length in sorted(asked):
        rows += [row | about for row in rows_of(method, length, **pace)]
        write_rows("selectors", sorted(rows, key=_order))
    rows.sort(key=_order)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n\n" + summary(rows) + "\n")
    if "moba" in flags.methods:
        longest = max(flags.lengths)
        tops = [top for top in (3, 8) if top * BLOCK <= longest]
        chosen = [choosing(longest, top, **pace) for top in tops]
        write_rows("choosing", [row | about for row in chosen])
        sys.stdout.write("\n" + markdown(chosen, CHOOSING) + "\n")
    summarise(DOCUMENT, rows)
    write_figure(result("selectors.png"), functools.partial(draw, rows=rows), (7, 4))
    return 0


def _order(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["method"], int(row["length"]), row["pass"]
