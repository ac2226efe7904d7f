"""Processes that train together: how they meet, what they exchange, how they end.

``initialize`` comes before anything that touches a device. After it every process runs
the same program on its own share of the batch, and no process may outlive the others:
a failure inside ``together`` ends its process at once, and the runtime ends those that
wait for a process that is gone. It does so by an abort, which Python cannot catch;
therefore each process has a watcher beside it, which says the last line for it.
"""

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparsejax.config import ConfigError, near
from sparsejax.tree import leaves
from sparsejax.typing import PyTree

__all__ = [
    "Process",
    "barrier",
    "gather_json",
    "global_batch",
    "initialize",
    "together",
]

CONNECT_SECONDS = 300
HEARTBEAT_SECONDS = 100

# What collectives and the runtime say when a process at the other end is gone.
_PEER_IS_GONE = (
    "Gloo",
    "NCCL",
    "by peer",
    "Socket closed",
    "heartbeat",
    "coordination service",
)


class Process(NamedTuple):
    """Which of how many processes this is."""

    index: int
    count: int


class _Meeting(NamedTuple):
    coordinator: str
    count: int
    index: int

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> Process:
    """Meet the other processes, if there are any, before any device is touched.

    What is not given is read from ``SPARSEJAX_COORDINATOR``, ``SPARSEJAX_PROCESSES``
    and ``SPARSEJAX_PROCESS_ID``. With ``SPARSEJAX_DISTRIBUTED=auto`` instead, JAX finds
    the others on clusters that it knows. Without any of them, this process is alone.
    ``SPARSEJAX_CONNECT_SECONDS`` bounds the meeting; a process that is silent for
    ``SPARSEJAX_HEARTBEAT_SECONDS`` counts as dead, and the others end.

    Args:
        coordinator: ``HOST:PORT`` at which process 0 can be reached.
        processes: how many there are.
        process_id: which of them this is, from 0.

    Raises:
        ConfigError: if the settings are not complete and legal, the port is taken, the
            coordinator cannot be reached, or devices are in use already.
    """
    meeting = _settings(coordinator, processes, process_id)
    automatic = _is_automatic(meeting)
    limits = {
        "initialization_timeout": _seconds("CONNECT", CONNECT_SECONDS),
        "heartbeat_timeout_seconds": _seconds("HEARTBEAT", HEARTBEAT_SECONDS),
    }
    if automatic:
        return _meet("SPARSEJAX_DISTRIBUTED=auto", {}, limits)
    if meeting is None or meeting.count == 1:
        return Process(0, 1)
    began = time.monotonic()
    _check_address(meeting, limits["initialization_timeout"])
    spent = int(time.monotonic() - began)
    limits["initialization_timeout"] = max(limits["initialization_timeout"] - spent, 1)
    place = {
        "coordinator_address": meeting.coordinator,
        "num_processes": meeting.count,
        "process_id": meeting.index,
    }
    return _meet(f"--coordinator={meeting.coordinator}", place, limits)


@contextlib.contextmanager
def together(
    process: Process, *, plain: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """End this process at once if the block fails, so that no other waits for it.

    Python's own way out would wait minutes for the others, which wait for this one.
    With a single process, errors pass as ever. The exit status is 2 for a
    ``ConfigError`` and 1 for anything else.

    Args:
        process: this one.
        plain: errors whose message says all; like a ``ConfigError``, they are told in
            one line, all others with their traceback.
    """
    try:
        yield
    except SystemExit as error:
        if process.count == 1 or not error.code:
            raise
        _leave(error.code if isinstance(error.code, int) else 1, f"{error.code}")
    except BaseException as error:
        if process.count == 1:
            raise
        if isinstance(error, (ConfigError, *plain)):
            _leave(2 if isinstance(error, ConfigError) else 1, f"error: {error}")
        _fail(process, error)


def global_batch(batch: PyTree, shardings: PyTree) -> PyTree:
    """Join the rows that each process has read to arrays over all devices.

    Args:
        batch: this process's rows; every process gives the same number.
        shardings: of the joined arrays; one may stand for a whole subtree.

    Raises:
        ValueError: if the joined rows cannot be cut as the shardings say.
    """
    try:
        return jax.make_array_from_process_local_data(shardings, batch)
    except ValueError as error:
        shapes = {path: np.shape(x) for path, x in leaves(batch).items()}
        raise ValueError(
            f"a batch of shapes {shapes} in each of {jax.process_count()} processes"
            f" does not fit the mesh ({str(error).splitlines()[0]}); make"
            " data.batch_size a multiple of the devices that share the batch"
        ) from error


def gather_json(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give every process the values of all processes, in their order.

    Every process must call it; the values are those that JSON gives back.
    """
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32))
    sizes = np.asarray(sizes).reshape(-1).tolist()
    # A power of two, so that texts of many sizes compile a few gathers only.
    padded = np.zeros(1 << max(6, max(sizes).bit_length()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)
    ]


def barrier(name: str) -> None:
    """Wait until every process has come to the barrier of this name."""
    multihost_utils.sync_global_devices(name)


def _settings(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> _Meeting | None:
    """Complete the flags from the environment and check them; None if none are set."""
    found = {
        "coordinator": coordinator or os.environ.get("SPARSEJAX_COORDINATOR") or None,
        "processes": _whole("processes", processes),
        "process_id": _whole("process_id", process_id),
    }
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return None
    if missing:
        raise ConfigError(
            f"--{missing[0]}: missing; --coordinator, --processes and --process_id (or"
            " SPARSEJAX_COORDINATOR, _PROCESSES and _PROCESS_ID) go together"
        )
    address, count, index = found.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"--coordinator={address}: must be HOST:PORT, where process 0 can be"
            " reached, such as 10.0.0.1:8476"
        )
    if count < 1:
        raise ConfigError(f"--processes={count}: must be positive")
    if not 0 <= index < count:
        raise ConfigError(
            f"--process_id={index}: must be in 0 … {count - 1}, as --processes={count};"
            " give every process its own number"
        )
    return _Meeting(address, count, index)


def _whole(name: str, given: int | None) -> int | None:
    text = os.environ.get(f"SPARSEJAX_{name.upper()}")
    if given is not None or not text:
        return given
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"SPARSEJAX_{name.upper()}={text}: must be a whole number"
        ) from None


def _seconds(name: str, default: int) -> int:
    value = _whole(f"{name}_seconds", None)
    if value is not None and value < 1:
        raise ConfigError(f"SPARSEJAX_{name}_SECONDS={value}: must be positive")
    return default if value is None else value


def _is_automatic(meeting: _Meeting | None) -> bool:
    mode = os.environ.get("SPARSEJAX_DISTRIBUTED")
    if not mode:
        return False
    if mode != "auto":
        raise ConfigError(
            f"SPARSEJAX_DISTRIBUTED={mode}: no such mode{near(mode, ['auto'])}"
        )
    if meeting is not None:
        raise ConfigError(
            "SPARSEJAX_DISTRIBUTED=auto: contradicts --coordinator, --processes and"
            " --process_id; unset the one or the others"
        )
    return True


def _check_address(meeting: _Meeting, seconds: int) -> None:
    """Meet the two faults that would end in an abort, where they can be explained."""
    host, port = meeting.address
    if meeting.index == 0:
        try:
            socket.create_server(("", port), family=socket.AF_INET).close()
        except OSError as error:
            raise ConfigError(
                f"--coordinator={meeting.coordinator}: process 0 cannot listen on port"
                f" {port} ({error.strerror}); choose a free port for all processes"
            ) from None
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--coordinator={meeting.coordinator}: process {meeting.index}"
                    f" could not reach it in {seconds} s ({error.strerror or error});"
                    " start process 0 there and open the port"
                ) from None
            time.sleep(0.2)
        else:
            return


def _meet(flag: str, place: Mapping[str, Any], limits: Mapping[str, Any]) -> Process:
    if jax.distributed.is_initialized():
        raise ConfigError(f"{flag}: the processes have met already; initialize once")
    watcher = _Watcher()
    watcher.words(
        f"error: {flag}: not all processes met within"
        f" {limits['initialization_timeout']} s; start every one of them, with the same"
        " coordinator and number of processes"
    )
    try:
        jax.distributed.initialize(**place, **limits)
    except (RuntimeError, ValueError) as error:
        watcher.dismiss()
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{flag}: the processes could not meet ({reason}); call initialize before"
            " any device is used, or name --coordinator, --processes and --process_id"
        ) from None
    process = Process(jax.process_index(), jax.process_count())
    watcher.words(_lost(process))
    atexit.register(_part, watcher)
    _watchers.append(watcher)
    return process


def _lost(process: Process) -> str:
    return (
        f"error: process {process.index} of {process.count} ended because another"
        " process died or could not be reached (or this one was killed); the log of the"
        " one that ended first has the cause; start all processes again to resume from"
        " the last checkpoint"
    )


class _Watcher:
    """A tiny process beside this one, which speaks if this one dies unheard."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("watch.py")
        # A session of its own, so that Ctrl-C in the terminal does not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def words(self, text: str) -> None:
        """Set what will be said; an empty text for nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # without a watcher, life goes on
            self._process.stdin.write(f"{text}\n".encode())
            self._process.stdin.flush()

    def dismiss(self) -> None:
        """Let the watcher go, without a word."""
        self.words("")
        self._process.communicate()


_watchers: list[_Watcher] = []


def _part(watcher: _Watcher) -> None:
    """Leave in order: wait for the others, and only then need no last words."""
    jax.distributed.shutdown()
    watcher.dismiss()


def _fail(process: Process, error: BaseException) -> NoReturn:
    if isinstance(error, KeyboardInterrupt):
        _leave(
            130,
            f"error: process {process.index} of {process.count} interrupted; start all"
            " processes again to resume from the last checkpoint",
        )
    traceback.print_exception(error)
    if any(words in str(error) for words in _PEER_IS_GONE):
        _leave(1, _lost(process))
    _leave(
        1,
        f"error: process {process.index} of {process.count} failed"
        f" ({type(error).__name__}, see above), and the others will end with it",
    )


def _leave(code: int, words: str) -> NoReturn:
    """End now; open files are the system's business, and the others will notice."""
    for watcher in _watchers:
        watcher.dismiss()
    sys.stdout.flush()
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()
    os._exit(code)
