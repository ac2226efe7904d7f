"""What a run says while it runs: metrics, a line of progress, a profile.

``metrics.jsonl`` is the record: one JSON object for each logged step, its numbers
written so that they read back bit for bit (``NaN`` and ``Infinity`` as Python spells
them). TensorBoard and the terminal show parts of it. A resumed run leaves the record
that an uninterrupted one would have left.
"""

import contextlib
import io
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from sparsejax.config import ConfigError
from sparsejax.train.workdir import write_atomically

__all__ = ["MetricsLog", "Profiler", "Progress", "read_metrics"]

# Generated code, whose names a type checker cannot see.
Event: Any = getattr(event_pb2, "Event")  # noqa: B009
SessionLog: Any = getattr(event_pb2, "SessionLog")  # noqa: B009

WINDOW = 20  # logged steps that the rates are measured over


class MetricsLog:
    """Append one line of metrics for each logged step; mirror them to TensorBoard."""

    def __init__(
        self,
        workdir: str | Path,
        *,
        resume_step: int | None = None,
        active: bool = True,
    ) -> None:
        """Open the record where a run of ``resume_step`` steps would have left it.

        Args:
            workdir: holds ``metrics.jsonl`` and ``tensorboard/``.
            resume_step: later lines, and a half-written one, are dropped; None starts
                an empty record.
            active: whether this process writes; the others keep silent.

        Raises:
            ValueError: if the record is damaged anywhere but in its last line.
        """
        self.active = active
        self.before: dict[str, Any] = {}  # the last line that a session before left
        if not active:
            return
        path = Path(workdir) / "metrics.jsonl"
        self.last_step = -1 if resume_step is None else resume_step
        self.before = _keep_through(path, self.last_step)
        self._file = open(path, "ab")  # noqa: SIM115
        self._events = _Events(Path(workdir) / "tensorboard", start=self.last_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the metrics of a step: numbers, arrays, or nested lists of numbers.

        Raises:
            ValueError: if a value is not numeric, or the step is before the last one.
        """
        if not self.active:
            return
        if step < self.last_step:
            raise ValueError(
                f"step={step}: metrics are written in the order of steps, and step"
                f" {self.last_step} is written already; open the log with resume_step"
            )
        self.last_step = step
        plain = {name: _plain(name, value) for name, value in values.items()}
        line = json.dumps({"step": step} | plain) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        self._events.write(step, dict(_scalars(plain)))

    def close(self) -> None:
        """Close the files; closing twice does no harm."""
        if self.active:
            self._file.close()
            self._events.close()
            self.active = False

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``, oldest first; empty if there is none.

    A last line that a killed run left unfinished is skipped.

    Raises:
        ValueError: if any other line is damaged.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # What follows the last newline is empty, or was cut short.
    return [_parse(path, number, line) for number, line in enumerate(lines[:-1], 1)]


class Progress:
    """One moving line on a terminal; elsewhere one plain line for each logged step."""

    def __init__(
        self,
        steps: int,
        *,
        active: bool = True,
        stream: io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to count to ``steps``.

        Args:
            steps: where the run ends.
            active: whether this process says anything at all.
            stream: where it is said; default: stderr.
            clock: seconds.
        """
        self.steps, self.active, self.step = steps, active, 0
        self._stream: Any = sys.stderr if stream is None else stream
        self._clock = clock
        self._bar: tqdm | None = None
        self._unseen: Mapping[str, Any] | None = None
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)

    def start(self, step: int) -> None:
        """Begin at ``step``: 0, or where a checkpoint was taken."""
        self.step = step
        if self.active and _is_terminal(self._stream):
            self._bar = tqdm(
                total=self.steps,
                initial=step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar:24}| {desc}",
            )

    def show(self, values: Mapping[str, Any]) -> None:
        """Show the metrics of the step that the next ``update`` names."""
        self._unseen = values

    def update(self, step: int) -> None:
        """Say that ``step`` steps are done."""
        self.step = step
        text = None
        if self._unseen is not None:
            text = self._describe(self._unseen)
            self._unseen = None
        if self._bar is not None:
            if text is not None:
                self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif text is not None and self.active:
            self._write(f"step {step}/{self.steps}{', ' if text else ''}{text}")

    def report(self, text: str) -> None:
        """Say something else, on a line of its own above the moving one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self.active:
            self._write(text)

    def close(self) -> None:
        """Leave the moving line as it stands; closing twice does no harm."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _describe(self, values: Mapping[str, Any]) -> str:
        """Loss, speed and time left; the speed is that of the recent past."""
        parts = []
        if "loss" in values:
            parts.append(f"loss {float(values['loss']):.4f}")
        if "eval/bits_per_byte" in values:
            parts.append(f"eval {float(values['eval/bits_per_byte']):.4f} bits/byte")
        self._recent.append((self._clock(), self.step, int(values.get("tokens", 0))))
        seconds, steps, tokens = (
            last - first
            for last, first in zip(self._recent[-1], self._recent[0], strict=True)
        )
        if seconds > 0 and steps > 0:
            parts.append(f"{_short(tokens / seconds)} tokens/s")
            left = (self.steps - self.step) * seconds / steps
            parts.append(f"{tqdm.format_interval(round(left))} left")
        return ", ".join(parts)


class Profiler:
    """Trace the steps ``START:STOP``, the last one excluded, with ``jax.profiler``."""

    def __init__(
        self, spec: str | None, directory: str | Path, *, steps: int | None = None
    ) -> None:
        """Read ``spec``; None never traces.

        Args:
            spec: which steps.
            directory: where traces go.
            steps: how many a run has, counted from 1.

        Raises:
            ConfigError: unless the spec is two numbers, the first below the second,
                and names a step of the run.
        """
        self.first, self.stop, self.directory = 0, 0, Path(directory)
        self.running = False
        if spec is not None:
            match = re.fullmatch(r"(\d+):(\d+)", spec)
            if match is None or int(match[1]) >= int(match[2]):
                raise ConfigError(
                    f"--profile={spec}: must be START:STOP, two step numbers with START"
                    " < STOP; 10:13 traces steps 10, 11 and 12"
                )
            self.first, self.stop = int(match[1]), int(match[2])
            if steps is not None and (self.first > steps or self.stop < 2):
                raise ConfigError(
                    f"--profile={spec}: names no step of the run, which has the steps 1"
                    f" to {steps}; name some of them"
                )

    def at(self, step: int, after: Any = None) -> None:
        """Start or stop the trace before ``step`` runs.

        Args:
            step: about to be taken.
            after: arrays that the steps before make; a trace that starts or stops here
                waits for them, so that it holds its own steps' work, whole.
        """
        wanted = self.first <= step < self.stop
        if wanted == self.running:
            return
        jax.block_until_ready(after)
        if wanted:
            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        else:
            self.close()

    def close(self) -> None:
        """Stop and write the trace, if one runs."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


class _Events:
    """A TensorBoard event file, written at once: no thread, no queue, no delay."""

    def __init__(self, directory: Path, *, start: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two runs that start within a second apart.
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"
        self._writer = EventsWriter(str(directory / "events"), suffix)
        # TensorBoard forgets what earlier files hold from this step on.
        self._put(start, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._put(step, summary=summary.scalar(name, value))
        self._writer.flush()

    def _put(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        self._writer.close()


def _plain(name: str, value: Any) -> Any:
    """Turn numbers and arrays into what JSON holds, without rounding."""
    if isinstance(value, list | tuple):
        return [_plain(name, x) for x in value]
    if isinstance(value, bool | int | float):
        return value
    array = np.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(np.float64).tolist()
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array.tolist()
    raise ValueError(
        f"metric {name!r}: {value!r} is not a number; give numbers, arrays of them, or"
        " nested lists"
    )


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Give what TensorBoard plots: a list becomes one curve, or two, for each layer."""
    for name, value in values.items():
        if not isinstance(value, list):
            yield name, float(value)
            continue
        for layer, row in enumerate(value):
            label = f"{name}/layer_{layer:02d}"
            if not isinstance(row, list):
                yield label, float(row)
            elif row:
                yield f"{label}/mean", float(np.mean(row))
                yield f"{label}/max", float(np.max(row))


def _keep_through(path: Path, step: int) -> dict[str, Any]:
    """Cut the record back to its lines of at most ``step``; give the last of them."""
    if not path.exists():
        return {}
    before = path.read_bytes()
    lines = before.split(b"\n")[:-1]
    kept = [
        line
        for number, line in enumerate(lines, 1)
        if step >= 0 and _parse(path, number, line)["step"] <= step
    ]
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        write_atomically(path, after.decode())
    return json.loads(kept[-1]) if kept else {}


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            return values
    raise ValueError(f"{path}, line {number}: not a line of metrics; delete it")


def _is_terminal(stream: Any) -> bool:
    """Whether it is a terminal that says how wide it is."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


def _short(value: float) -> str:
    """Three digits and a unit: 12.3k."""
    if not math.isfinite(value):
        return str(value)
    return tqdm.format_sizeof(value)
