"""A workdir is one run's home: its config, a lock, and files that appear whole.

``open_workdir`` is the only door. A workdir belongs to one config for good, is written
by one run at a time, and every JSON file in it is replaced in one piece, so a reader
sees the old file or the new one. Problems a user can solve are ``ConfigError`` before
the run, ``DiskError`` during it: one line with the path, the rule and the remedy.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax

from sparsejax.config import ConfigError, require

__all__ = [
    "DiskError",
    "Workdir",
    "check_place",
    "disk_guard",
    "format_summary",
    "open_workdir",
    "write_atomically",
    "write_summary",
]

NAMED = 3  # differences that an error message spells out
TRACES = ("metrics.jsonl", "checkpoints", "summary.json")  # what only a run leaves
_MISSING = object()

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system has become read-only; remount it",
    errno.EACCES: "permission was denied; restore write permission",
}


class DiskError(RuntimeError):
    """A run could not write its files; the message is one line, meant for the user."""


@dataclass(frozen=True, kw_only=True)
class Workdir:
    """An open workdir; leaving its ``with`` block, or dying, lets go of the lock."""

    path: Path
    fingerprint: str
    is_new: bool  # no run has been here before
    lock: int | None  # file descriptor, None in processes that write nothing

    def close(self) -> None:
        """Let another run in; closing twice does no harm."""
        if self.lock is not None:
            with contextlib.suppress(OSError):
                os.close(self.lock)

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_workdir(
    path: str | Path,
    config: Mapping[str, Any],
    fingerprint: str,
    *,
    free: tuple[str, ...] = (),
    active: bool = True,
) -> Workdir:
    """Create or take up a workdir, lock it, and write ``config.json``.

    Args:
        path: a directory, made if it is not there.
        config: nested plain values, as ``config.to_dict`` gives them.
        fingerprint: of the config, kept beside it.
        free: dotted fields or sections that may differ from those the workdir was
            made with.
        active: whether this process writes (process 0 does); the others only learn
            where the workdir is.

    Raises:
        ConfigError: if the path is a file or cannot be written, another run is writing
            there, or the workdir belongs to another config.
    """
    path = Path(path)
    if not active:
        return Workdir(path=path, fingerprint=fingerprint, is_new=False, lock=None)
    with _as_config_error(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    try:
        is_new = _check_owner(path, config, free)
        with _as_config_error(path):
            write_atomically(path / "config.json", _dump(_card(config, fingerprint)))
    except BaseException:
        os.close(lock)
        raise
    return Workdir(path=path, fingerprint=fingerprint, is_new=is_new, lock=lock)


def check_place(flag: str, path: Path) -> None:
    """Raise ``FieldError`` unless a file can be there: before long work for it."""
    room = path.parent.is_dir() and not path.is_dir()
    require(room, flag, str(path), "must be a file in a folder that is there")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one piece: readers, and crashes, see all of it or none."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def disk_guard(path: str | Path) -> Iterator[None]:
    """Turn a full or read-only disk, met inside the block, into one clear error.

    Raises:
        DiskError: naming the path and the remedy, from whatever library's error.
    """
    try:
        yield
    except Exception as error:
        cause = _disk_fault(error)
        if cause is None:
            raise
        where = getattr(cause, "filename", None) or path
        raise DiskError(
            f"{where}: {_REMEDIES[_number(cause)]}, then start the same command again"
            " to resume from the last checkpoint"
        ) from error


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``."""
    write_atomically(Path(path) / "summary.json", _dump(summary))


def format_summary(summary: Mapping[str, Any]) -> str:
    """Lay a summary out as a table of names and values for people.

    Names end in their unit: ``_bytes`` and ``_seconds`` are shown in a size that reads
    well, counts with separators, ratios with four digits.
    """
    rows = [(_title(k), _show(k, v)) for k, v in _flatten(summary).items()]
    left = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{left}}  {value}" for name, value in rows)


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _card(config: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    devices = jax.devices()
    return {
        "fingerprint": fingerprint,
        "versions": {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
        "device": {"kind": devices[0].device_kind, "count": len(devices)},
        "config": config,
    }


@contextlib.contextmanager
def _as_config_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"--workdir={path}: it, or a part of it, is a file; name a directory"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--workdir={path}: cannot be written ({error.strerror or error}); name a"
            " directory that this user may write, on a disk with free space"
        ) from None


def _lock(path: Path) -> int:
    """Hold the workdir's lock; the system lets go of it when the process ends."""
    lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 200, 0).decode(errors="replace").strip()
        os.close(lock)
        raise ConfigError(
            f"--workdir={path}: another run is writing there"
            f" ({owner or 'owner unknown'}); wait for it, or name another --workdir"
        ) from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return lock


def _check_owner(path: Path, config: Mapping[str, Any], free: tuple[str, ...]) -> bool:
    """Refuse a workdir of another config; say whether no run has been here."""
    file, left = path / "config.json", [x for x in TRACES if (path / x).exists()]
    if not file.exists():
        if left:
            raise ConfigError(
                f"--workdir={path}: has {left[0]} but no config.json, so its config"
                " is unknown; name another --workdir, or empty this one"
            )
        return True
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{file}: not the config of a run; name another --workdir, or delete it"
        ) from None
    differences = _differences(before, json.loads(json.dumps(config)), free)
    if differences and left:
        more = len(differences) - NAMED
        tail = f" and {more} more" if more > 0 else ""
        raise ConfigError(
            f"--workdir={path}: belongs to another config, where"
            f" {', '.join(differences[:NAMED])}{tail}; name another --workdir, or give"
            " these fields their values back"
        )
    return bool(differences)  # of a config that was refused before its first step


def _differences(before: Any, now: Any, free: tuple[str, ...]) -> list[str]:
    """Spell every field that differs and is not free, with both values."""
    old, new = _flatten(before), _flatten(now)

    def spell(fields: dict[str, Any], name: str) -> str:
        return json.dumps(fields[name]) if name in fields else "absent"

    return [
        f"config.{name} is {spell(old, name)} (here {spell(new, name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, _MISSING) != new.get(name, _MISSING)
        and not any(name == f or name.startswith(f"{f}.") for f in free)
    ]


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _number(error: BaseException) -> int:
    """Error number of a disk fault, 0 for anything else."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REMEDIES else 0
    # Checkpoints are written in C++, which leaves only the text of the error.
    told = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return next((n for n in told if os.strerror(n) in str(error)), 0)


def _disk_fault(error: BaseException) -> BaseException | None:
    """Search an error and what led to it for the one that came from the disk."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, ConfigError):
        if _number(link):
            return link
        link = link.__cause__ or (
            None if link.__suppress_context__ else link.__context__
        )
    return None


def _title(name: str) -> str:
    for unit in ("_bytes", "_seconds"):
        name = name.removesuffix(unit)
    return name.replace("_", " ").replace(".", " / ")


def _show(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(_show(name, x) for x in value) or "none"
    if name.endswith("_bytes"):
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    return _duration(value) if name.endswith("_seconds") else _quantity(value)


def _quantity(value: int | float) -> str:
    if isinstance(value, int) or 1e4 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"))


def _duration(seconds: int | float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds % 60:02.0f} s" if minutes else f"{seconds:.2f} s"


def _scaled(value: int | float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < base:
            return f"{value:.4g} {unit}".rstrip()
        value /= base
    return f"{value:.4g} {units[-1]}"
