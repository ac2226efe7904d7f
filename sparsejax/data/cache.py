"""The folder where prepared data is kept, shared by every run and process of a machine.

What is written here is a function of contents that are part of its name, appears in one
step and never changes. Whoever writes holds a lock that dies with its process.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_root", "locked", "write_atomically"]


def cache_root(folder: str | None) -> Path:
    """Give the cache: ``folder``, else ``$SPARSEJAX_CACHE``, else ``~/.cache``."""
    chosen = folder or os.environ.get("SPARSEJAX_CACHE") or "~/.cache/sparsejax"
    return Path(chosen).expanduser().absolute()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; wait for whoever holds it, living or remote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is seen complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
