"""Batches for training: in order, read ahead, and resumable to the bit.

The rows of a batch come from numbered streams. A process reads a consecutive part of
them, so batches joined in the order of processes are the same however many there are,
and so is the state: a dict from stream to position that any division can resume from.
"""

import contextlib
import dataclasses
import json
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from sparsejax.config import ConfigError
from sparsejax.data.tokenizer import Tokenizer

__all__ = ["Batch", "Data", "Stream", "TrainIterator", "merge_states"]

Position = dict[int, dict[str, Any]]  # by stream


class Batch(NamedTuple):
    """Rows of packed documents; no token is in two rows."""

    tokens: Int32[np.ndarray, "b t+1"]
    segments: Int32[np.ndarray, "b t+1"]  # 1, 2, ... along a row; 0 is padding
    positions: Int32[np.ndarray, "b t+1"]  # restart at 0 with every segment


@runtime_checkable
class Stream(Protocol):
    """One source of rows, resumable."""

    def __next__(self) -> Batch:
        """Give the stream's rows of the next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Give the position after the last rows."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        ...


class TrainIterator:
    """This process's rows of every batch, forever.

    ``state`` is the position after the last batch that was handed out, whatever has
    been read ahead.
    """

    def __init__(
        self,
        streams: Mapping[int, Stream],
        *,
        fingerprint: str,
        prefetch: int,
        threads: int = 1,
    ):
        self._streams = dict(streams)
        self._fingerprint = fingerprint
        self._prefetch = prefetch
        self._threads = min(threads, len(self._streams))
        self._position = _positions(self._streams)
        self._batches: Iterator[tuple[Batch, Position]] | None = None
        self._stop: Callable[[], Any] = _nothing

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        try:
            batch, self._position = next(self._batches)
        except BaseException:
            self.close()
            raise
        return batch

    def state(self) -> dict[str, Any]:
        """Give the position, as values that JSON keeps."""
        streams = {str(i): _plain(state) for i, state in self._position.items()}
        return {"reader": self._fingerprint, "streams": streams}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch where ``state`` was taken.

        Raises:
            ConfigError: if it is of other data, or lacks streams that are read here.
        """
        if state["reader"] != self._fingerprint:
            raise ConfigError(
                f"data: the checkpoint read {state['reader']!r}, this run reads"
                f" {self._fingerprint!r}; text, tokenizer, seq_len, batch_size and seed"
                " must be the same to continue"
            )
        missing = [i for i in self._streams if str(i) not in state["streams"]]
        if missing:
            raise ConfigError(
                f"data: the checkpoint lacks the positions of streams {missing};"
                " merge_states joins those of all processes"
            )
        self.close()
        self._position = {i: state["streams"][str(i)] for i in self._streams}

    def close(self) -> None:
        """Stop reading ahead; the next batch is still the one after the last."""
        if self._batches is not None:
            self._stop()
            self._batches = None

    def _start(self) -> Iterator[tuple[Batch, Position]]:
        for i, stream in self._streams.items():
            stream.set_state(self._position[i])
        read = _reading(self._streams, self._threads)
        if not self._prefetch:
            return read
        ahead = _Ahead(read, self._prefetch)
        self._stop = weakref.finalize(self, ahead.stop)
        return ahead


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the states of all processes into one, which any number can restore.

    Raises:
        ConfigError: if they are not of the same data.
    """
    states = list(states)
    readers = {state["reader"] for state in states}
    if len(readers) != 1:
        raise ConfigError(f"data: states of {len(readers)} readers: {sorted(readers)}")
    streams = {i: s for state in states for i, s in state["streams"].items()}
    return {"reader": readers.pop(), "streams": streams}


@dataclasses.dataclass(frozen=True)
class Data:
    """What ``open_data`` gives: batches to learn from, batches to judge by."""

    tokenizer: Tokenizer
    train: TrainIterator
    documents: dict[str, int]  # how many, by split
    fingerprint: str  # equal if the same batches follow
    # The first so many batches of validation text, this process's rows: the same at
    # every call, in every run, for every seed. Where the text ends, rows are empty;
    # there is no batch without any text, so there may be fewer.
    evaluation: Callable[[int], list[Batch]]

    def close(self) -> None:
        """Stop reading ahead."""
        self.train.close()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Spell a state as JSON gives it back, lists for tuples."""
    return json.loads(json.dumps(state))


def _nothing() -> None:
    """Stop nothing."""


def _positions(streams: Mapping[int, Stream]) -> Position:
    return {i: stream.get_state() for i, stream in streams.items()}


def _reading(
    streams: Mapping[int, Stream], threads: int
) -> Generator[tuple[Batch, Position], None, None]:
    """Read a part of the batch from every stream, and note where that left them."""
    if threads == 1:
        while True:
            parts = [next(stream) for stream in streams.values()]
            yield _joined(parts), _positions(streams)
    with ThreadPoolExecutor(threads) as pool:
        while True:
            parts = list(pool.map(_next, streams.values()))
            yield _joined(parts), _positions(streams)


def _next(stream: Stream) -> Batch:
    return next(stream)


def _joined(parts: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class _Ahead:
    """Values of an iterator, taken by a thread before they are asked for."""

    def __init__(self, values: Generator[Any, None, None], count: int):
        self._values = values
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(count)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        value, error = self._ready.get()
        if error is not None:
            raise error
        return value

    def stop(self) -> None:
        """End the thread; what it had ready is lost."""
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        self._values.close()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._ready.put((next(self._values), None))
        except BaseException as error:  # for the thread that asks
            self._ready.put((None, error))
