"""The pages' figures: `python docs/figures.py` draws them again.

Three show what the code does to numbers drawn at random, two are of `results/`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from sparsejax.attention import PATTERNS, BlockMask, causal, first, sliding_window
from sparsejax.bench.table import read_rows
from sparsejax.masked import STRUCTURES
from sparsejax.moe import ROUTERS, expert_load, updated_bias
from sparsejax.sweep import read_table
from sparsejax.train.mask_plots import draw_mask
from sparsejax.train.plots import style

FOLDER = Path(__file__).parent / "figures"
LENGTH, TOKENS, EXPERTS, SIDE = 64, 2048, 16, 32


def patterns() -> Figure:
    """Draw who reads whom among 64 positions; grey squares are live blocks."""
    rules = {
        "sliding_window": PATTERNS["sliding_window"](12),
        "streaming_llm": PATTERNS["streaming_llm"](4, 12),
        "strided": PATTERNS["strided"](8),
        "fixed": PATTERNS["fixed"](8, 2),
        "dilated": PATTERNS["dilated"](6, 3),
        "bigbird": PATTERNS["bigbird"](LENGTH, block=4),
        "power_attention": PATTERNS["power_attention"](4, window=1),
        "causal & (window | first)": causal() & (sliding_window(6) | first(10)),
    }
    figure = Figure(figsize=(8, 4.4))
    size = {"q_len": LENGTH, "kv_len": LENGTH, "block_q": 4, "block_kv": 4}
    for axes, (name, rule) in zip(
        figure.subplots(2, 4).flat, rules.items(), strict=True
    ):
        mask = BlockMask.from_pattern(rule, **size)
        read = np.asarray(mask.to_dense())[0, 0]
        live = read.reshape(16, 4, 16, 4).any((1, 3)).repeat(4, 0).repeat(4, 1)
        axes.imshow(0.18 * live + 0.82 * read, cmap="Blues", vmin=0, vmax=1.2)
        axes.set_title(f"{name}\n{mask.density():.0%} of blocks live", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
    return figure


def balanced(logits: jax.Array) -> jax.Array:
    """Give the bias that 400 updates by the load arrive at."""

    def update(_: int, bias: jax.Array) -> jax.Array:
        routing = ROUTERS["sigmoid_top_k"](logits, k=2, bias=bias)
        return updated_bias(bias, expert_load(routing), rate=0.005)

    return jax.lax.fori_loop(0, 400, update, jnp.zeros(EXPERTS))


def loads() -> Figure:
    """Draw how many tokens each expert gets when some are liked better than others."""
    liking = jnp.linspace(1.5, -1.5, EXPERTS)
    noise = jax.random.normal(jax.random.key(0), (TOKENS, EXPERTS))
    logits = noise + liking[None]
    calls: dict[str, dict[str, Any]] = {
        "softmax_top_k": {"k": 2},
        "switch": {"k": 1},
        "sigmoid_top_k": {"k": 2, "bias": balanced(logits)},
        "s_base": {"k": 2, "key": jax.random.key(1)},
        "base": {"k": 1, "key": jax.random.key(1)},
        "expert_choice": {"k": 2},
    }
    figure = Figure(figsize=(8, 4))
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (name, options) in zip(panels.flat, calls.items(), strict=True):
        load = np.asarray(expert_load(ROUTERS[name](logits, **options)))
        axes.set_axisbelow(True)
        axes.bar(range(EXPERTS), EXPERTS * load / load.sum())
        axes.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
        bias = ", with a bias" if "bias" in options else ""
        axes.set_title(f"{name}, k={options['k']}{bias}")
    for axes in panels[-1]:
        axes.set_xlabel("expert, the best liked first")
    for axes in panels[:, 0]:
        axes.set_ylabel("tokens over the\nmean of all experts")
    return figure


def slots() -> Figure:
    """Draw what slots cost, of ``results/memory.csv``."""
    rows = read_rows("memory")
    figure = Figure(figsize=(7, 3))
    lookup, step = figure.subplots(1, 2)
    for axes, work, label in (
        (lookup, ("lookup", ""), "lookup"),
        (step, ("step", "dense"), "dense gradients"),
        (step, ("step", "rows"), "by rows"),
        (step, ("step, rows given", "rows"), "by rows, given equally many"),
    ):
        seen = [r for r in rows if (r["work"], r["training"]) == work]
        x = np.array([float(r["slots"]) for r in seen])
        y = np.array([float(r["ms"]) for r in seen])
        axes.loglog(x, y, marker="o", label=label)
        axes.set_xlabel("slots")
    root = np.array([2.0**12, 2.0**20])
    least = min(float(r["ms"]) for r in rows if r["work"] == "lookup")
    scale = least / root[0] ** 0.5
    lookup.plot(root, scale * root**0.5, ":", color="#333333", label="their root")
    lookup.set(title="one lookup", ylabel="milliseconds")
    step.set(ylim=(1e2, 2e3), title="one training step of PEER")
    for axes in (lookup, step):
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend()
    return figure


def frontier() -> Figure:
    """Draw what FLOPs and parameters buy, of ``results/frontier.csv``."""
    rows = read_table("frontier")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    cost, size = figure.subplots(1, 2, sharey=True)
    longest = rows["tokens"] == rows["tokens"].max()
    kinds = dict.fromkeys(rows["kind"].tolist())
    for kind, marker in zip(kinds, "osD^vP*", strict=True):
        own = longest & (rows["kind"] == kind)
        look = {"marker": marker, "markersize": 4, "label": kind, "linewidth": 0.8}
        cost.plot(rows["useful_flops"][own], rows["loss"][own], **look)
        size.plot(rows["parameters_total"][own], rows["loss"][own], **look)
    cost.set(xscale="log", xlabel="useful FLOPs of the run", ylabel="loss (nats/byte)")
    size.set(xscale="log", xlabel="parameters")
    cost.xaxis.set_minor_formatter(NullFormatter())
    cost.legend()
    return figure


def structures() -> Figure:
    """Draw the masks that each structure makes of the same scores."""
    made: dict[str, dict[str, Any]] = {
        "unstructured": {},
        "n_of_m": {"m": 4, "axis": 0},
        "transposable": {"m": 4},
        "constant_fan_in": {"axis": 0},
        "block": {"tile": (8, 8)},
        "row": {},
        "column": {},
        "butterfly": {"block": 4},
    }
    scores = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    figure = Figure(figsize=(8, 4.6))
    for axes, (name, options) in zip(
        figure.subplots(2, 4).flat, made.items(), strict=True
    ):
        mask = STRUCTURES[name](**options)(scores, SIDE * SIDE // 4)
        draw_mask(axes, np.asarray(mask, float), name=name)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "frontier": frontier,
    "patterns": patterns,
    "routers": loads,
    "slots": slots,
    "structures": structures,
}


def main() -> None:
    """Draw all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        with style():
            FigureCanvasAgg(figure()).print_png(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
