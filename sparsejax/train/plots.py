"""Figures of a run, each a function of its table of metrics.

``(axes, table) -> axes``: a table is what ``read_metrics`` returns. Both axes are
labelled with units, and a baseline is drawn where there is one. ``style`` is the one
look of all figures; nothing here touches matplotlib's global state.
"""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from sparsejax.train.metrics import read_metrics

__all__ = [
    "attention_pattern",
    "eval_curve",
    "expert_load",
    "loss_curves",
    "mask_density",
    "memory_usage",
    "style",
    "write_figure",
    "write_plots",
]

Table = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "#333333"
_LEVELS = ("#F2F2F2", "#9ACBEB", "#0072B2")  # blocks: empty, partial, full
COLUMNS = 600  # of a heat map: more would not be seen
MANY = 12  # panels, or curves, that one figure can still show


class Column(NamedTuple):
    """One metric over the steps that have it."""

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray  # first axis: steps


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Give every figure made inside the one look of this project."""
    look: dict[Any, Any] = {
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.h_pad": 0.09,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.09,
        "figure.dpi": 150,
        "font.size": 9,
        "grid.color": "#E4E4E4",
        "image.interpolation": "nearest",
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "savefig.dpi": 150,
    }
    with mpl.rc_context(look):
        yield


def column(table: Table, name: str) -> Column:
    """Collect a metric from the lines that have it."""
    rows = [row for row in table if name in row]
    return Column(
        np.array([row["step"] for row in rows]),
        np.array([row.get("tokens", np.nan) for row in rows], float),
        np.array([row[name] for row in rows], float),
    )


def loss_curves(axes: Axes, table: Table) -> Axes:
    """Training loss over tokens: every logged step, and its running mean."""
    seen = column(table, "loss")
    axes.plot(seen.tokens, seen.values, color=COLORS[0], alpha=0.4, linewidth=0.8)
    axes.plot(
        seen.tokens,
        _running_mean(seen.values),
        color=COLORS[0],
        marker="o" if len(seen.values) == 1 else None,
        markersize=3,
        label="train",
    )
    held_out = column(table, "eval/loss")
    if held_out.values.size:
        axes.plot(
            held_out.tokens,
            held_out.values,
            color=COLORS[1],
            marker="o",
            markersize=3,
            label="held out",
        )
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    return _over_tokens(axes)


def eval_curve(axes: Axes, table: Table) -> Axes:
    """Bits per byte of the held-out text over tokens; the best is marked."""
    seen = column(table, "eval/bits_per_byte")
    axes.plot(seen.tokens, seen.values, color=COLORS[1], marker="o", markersize=3)
    best = int(np.nanargmin(seen.values)) if np.isfinite(seen.values).any() else 0
    axes.axhline(seen.values[best], color=INK, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"best {seen.values[best]:.3f}",
        (0, seen.values[best]),
        xycoords=("axes fraction", "data"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        color=INK,
    )
    axes.margins(y=0.15)
    axes.set_ylabel("held-out bits per byte")
    return _over_tokens(axes)


def expert_load(
    axes: Axes, table: Table, *, layer: int = 0, name: str = "moe/load"
) -> Axes:
    """Share of the tokens that each expert of a layer gets, against the uniform share.

    White is the uniform share; the colours end at a quarter and at four times of it,
    and an expert without a token is black.
    """
    seen = column(table, name)
    load = seen.values[:, layer].T
    share = load / np.maximum(load.mean(axis=0, keepdims=True), 1e-30)
    _heat(axes, seen.steps, np.ma.masked_equal(share, 0))
    axes.set_ylabel("expert")
    axes.set_title(f"MoE layer {layer}")
    return axes


def attention_pattern(axes: Axes, levels: np.ndarray, *, name: str = "") -> Axes:
    """Blocks of an attention mask: 0 empty, 1 partial, 2 full."""
    levels = np.asarray(levels)
    axes.imshow(levels, cmap=ListedColormap(_LEVELS), vmin=0, vmax=2, aspect="equal")
    axes.grid(False)
    live = np.count_nonzero(levels)
    axes.set_title(f"{name}\n{live / levels.size:.0%} of blocks live".strip())
    axes.set_xlabel("key block")
    axes.set_ylabel("query block")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return axes


def mask_density(axes: Axes, table: Table) -> Axes:
    """Density of the masks over steps: one colour for each path, one line a layer.

    Heavy lines are means over the layers; the dotted line is a dense model.
    """
    names = named(table, "masked/density/*")
    shown = names[:MANY]
    for number, name in enumerate(shown):
        seen = column(table, name)
        layers = seen.values.reshape(len(seen.steps), -1)
        look: dict[str, Any] = {
            "color": COLORS[number % len(COLORS)],
            "linestyle": ("-", "--")[number // len(COLORS)],
        }
        if layers.shape[1] > 1:
            axes.plot(seen.steps, layers, linewidth=0.6, alpha=0.45, **look)
        label = name.removeprefix("masked/density/")
        axes.plot(seen.steps, layers.mean(axis=1), label=label, **look)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("density (share of weights kept)")
    title = f"first {MANY} of {len(names)}" if len(names) > MANY else None
    legend_beside(axes, len(shown), title)
    return over_steps(axes)


def memory_usage(axes: Axes, table: Table, *, name: str = "memory/usage") -> Axes:
    """Share of a memory's slots that one batch reads, for each memory layer.

    The dotted line is a memory of which every slot is read.
    """
    seen = column(table, name)
    layers = seen.values.reshape(len(seen.steps), -1)
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, layers.shape[1]))
    for layer, color in enumerate(colors):
        label = f"memory layer {layer}"
        axes.plot(seen.steps, layers[:, layer], color=color, label=label)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share of slots read in a batch")
    legend_beside(axes, layers.shape[1], None)
    return over_steps(axes)


def write_figure(
    path: Path, draw: Callable[[Axes], object], size: tuple[int, int] = (6, 4)
) -> None:
    """Draw one pair of axes in the project's look, and write it; size in inches."""
    with style():
        figure = Figure(figsize=size)
        draw(figure.subplots())
        FigureCanvasAgg(figure).print_png(path)


def write_plots(
    workdir: str | Path,
    patterns: Mapping[str, np.ndarray] | None = None,
    *,
    more: Mapping[str, Callable[[Table], Figure | None]] | None = None,
) -> list[Path]:
    """Draw every figure that the run has data for into ``plots/*.png``.

    Args:
        workdir: holds ``metrics.jsonl``.
        patterns: block pictures of attention masks, by layer name.
        more: further figures by file name, each made from the table; None: no data.
    """
    table = read_metrics(workdir)
    folder = Path(workdir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Figure | None]] = {
        "loss": lambda: _loss_figure(table),
        "expert_load": lambda: _load_figure(table),
        "mask_density": lambda: _single(mask_density, table, "masked/density/*"),
        "memory_usage": lambda: _single(memory_usage, table, "memory/usage"),
        "attention": lambda: _pattern_figure(patterns or {}),
    }
    for name, make in (more or {}).items():
        figures[name] = functools.partial(make, table)
    written = []
    with style():
        for name, draw in figures.items():
            figure = draw()
            if figure is not None:
                FigureCanvasAgg(figure).print_png(folder / f"{name}.png")
                written.append(folder / f"{name}.png")
    return written


def _loss_figure(table: Table) -> Figure | None:
    drawn = [f for f, name in _LOSSES.items() if named(table, name)]
    if not drawn:
        return None
    figure = Figure(figsize=(6.4, 3.2 * len(drawn)))
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, draw in zip(panels, drawn, strict=True):
        draw(axes, table)
        axes.label_outer()
    return figure


def _load_figure(table: Table) -> Figure | None:
    load = column(table, "moe/load").values
    if not load.size:
        return None
    layers = evenly(load.shape[1])
    rows, columns = grid(len(layers))
    figure = Figure(figsize=(1.4 + 3.1 * columns, 0.7 + 2.5 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, layer in zip(panels.flat, layers, strict=False):
        expert_load(axes, table, layer=layer)
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()
    bar = figure.colorbar(
        panels[0, 0].collections[0], ax=panels, extend="both", aspect=30
    )
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1 (uniform)", "2", "4"])
    bar.minorticks_off()
    bar.set_label("load of the expert / uniform share\n(black: no token)")
    return figure


def _pattern_figure(patterns: Mapping[str, np.ndarray]) -> Figure | None:
    if not patterns:
        return None
    names = [list(patterns)[i] for i in evenly(len(patterns))]
    rows, columns = grid(len(names))
    figure = Figure(figsize=(0.4 + 2.7 * columns, 0.5 + 3.1 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        attention_pattern(axes, patterns[name], name=name)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    figure.legend(
        handles=[
            Patch(facecolor=color, edgecolor=INK, linewidth=0.5, label=label)
            for color, label in zip(_LEVELS, ("empty", "partial", "full"), strict=True)
        ],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _single(draw: Callable[..., Axes], table: Table, name: str) -> Figure | None:
    if not named(table, name):
        return None
    figure = Figure(figsize=(6.4, 3.6))
    draw(figure.subplots(), table)
    return figure


def named(table: Table, pattern: str) -> list[str]:
    """Metrics of a table whose names match, in the order of their first appearance."""
    seen = dict.fromkeys(name for row in table for name in row)
    return [name for name in seen if fnmatch.fnmatchcase(name, pattern)]


def evenly(count: int) -> list[int]:
    """Choose all of few, or ``MANY`` of many, the first and the last among them."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, MANY)).round())
        .astype(int)
        .tolist()
    )


def grid(count: int) -> tuple[int, int]:
    """Give rows and columns of panels."""
    columns = min(count, 3 if count > 4 else 2)
    return -(-count // columns), columns


def _heat(axes: Axes, steps: np.ndarray, ratio: np.ndarray) -> None:
    """Colour rows of ratios over steps, on a scale that is symmetric about one."""
    stride = -(-len(steps) // COLUMNS)
    steps, ratio = steps[::stride], ratio[:, ::stride]
    middle = (steps[1:] + steps[:-1]) / 2
    ends = np.array([steps[0], steps[-1]]) + np.array([-0.5, 0.5])
    edges = np.concatenate([ends[:1], middle, ends[1:]])
    axes.pcolormesh(
        edges,
        np.arange(len(ratio) + 1) - 0.5,
        ratio,
        cmap=mpl.colormaps["RdBu_r"].with_extremes(bad="black"),
        norm=LogNorm(0.25, 4),
        rasterized=True,
    )
    axes.grid(False)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    over_steps(axes)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of a fiftieth of the run around each point, shorter at its ends."""
    reach = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    near = np.minimum(np.minimum(place, place[::-1]), reach)
    return (total[place + near + 1] - total[place - near]) / (2 * near + 1)


def legend_beside(axes: Axes, entries: int, title: str | None) -> None:
    """Put the legend to the right, if there is anything to tell apart."""
    if entries > 1 or title:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=title)


def _over_tokens(axes: Axes) -> Axes:
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    return axes


def over_steps(axes: Axes) -> Axes:
    """Label the horizontal axis."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    return axes


_LOSSES = {loss_curves: "loss", eval_curve: "eval/bits_per_byte"}
