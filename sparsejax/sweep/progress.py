"""What a sweep says while it runs: a live table where there is a terminal."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sparsejax.nn.cost import Cost
from sparsejax.sweep.grid import Point

__all__ = ["Board", "listing"]

SHOWN = 12  # newest rows of the live table


def _named(point: Point) -> str:
    labels = ", ".join(_short(value) for value in point.labels.values())
    return f"{labels}, seed {point.config.seed}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds % 60:02.0f} s"


def listing(
    points: Sequence[Point], costs: Sequence[Cost], done: Sequence[bool]
) -> None:
    """Print every point with what it will cost; masks are not counted."""
    table = Table("point", "run", "active", "total", "tokens", "FLOPs", "", box=None)
    table.columns[1].no_wrap = True
    for point, cost, ready in zip(points, costs, done, strict=True):
        data, steps = point.config.data, point.config.train.steps
        tokens = steps * data.batch_size * data.seq_len
        table.add_row(
            _named(point),
            point.fingerprint,
            f"{cost.active:,.0f}",
            f"{cost.total:,}",
            f"{tokens:,}",
            f"{cost.useful_flops * tokens:.3g}",
            "done" if ready else "",
        )
    Console().print(table)


class Board:
    """The live table: what has finished, what failed, how long it will take."""

    def __init__(self, total: int, before: int, console: Console | None = None) -> None:
        self.total, self.before = total, before
        self.rows: list[tuple[str, str, str]] = []
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self.elapsed = 0.0
        self.console = console or Console(stderr=True)
        self.live = Live(self.table(), console=self.console, auto_refresh=False)

    def __enter__(self) -> "Board":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()
        for failure in self.failures:
            self.console.print(f"failed: {failure}", highlight=False, markup=False)

    def finished(self, point: Point, row: Mapping[str, Any], elapsed: float) -> None:
        """Show a row, and what the rows so far promise."""
        self.seconds.append(float(row["seconds"]))
        self.elapsed = elapsed
        took = _clock(float(row["seconds"]))
        self.rows.append((_named(point), f"{row['loss']:.4f}", took))
        self.live.update(self.table(), refresh=True)

    def failed(self, point: Point, message: str) -> None:
        """Show a failure; its whole message is printed at the end."""
        self.failures.append(message)
        self.rows.append((_named(point), "failed", ""))
        self.live.update(self.table(), refresh=True)

    def left(self) -> float | None:
        """Give the seconds that the remaining points will take, at the pace so far."""
        ended = len(self.seconds) + len(self.failures)
        if not self.seconds:
            return None
        pace = self.elapsed / ended if self.elapsed else statistics.mean(self.seconds)
        return pace * (self.total - self.before - ended)

    def table(self) -> Table:
        """Lay out the newest rows under a line of totals."""
        ended = self.before + len(self.seconds)
        left = self.left()
        title = f"{ended} of {self.total} points, {len(self.failures)} failed"
        title += "" if left is None else f", {_clock(left)} left"
        table = Table("point", "loss", "took", title=title)
        for row in self.rows[-SHOWN:]:
            table.add_row(*row)
        return table
