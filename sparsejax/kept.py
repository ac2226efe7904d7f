"""A report that is written part by part, and gone on with if it was not finished."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sparsejax.train.workdir import write_atomically

__all__ = ["Kept", "listing"]


class Kept:
    """A report in the making; in a file, if there is one, from part to part.

    Args:
        file: replaced in one piece. What it holds counts if it was ``asked`` the same.
        asked: all that the numbers depend on.
    """

    def __init__(self, file: Path | None, asked: dict[str, Any]) -> None:
        self._file = file
        self.report = {"asked": asked, "finished": False}
        try:
            before = json.loads(file.read_text()) if file and file.exists() else {}
        except ValueError:
            before = {}
        if isinstance(before, dict) and before.get("asked") == asked:
            self.report = before

    def keep(self, **parts: Any) -> None:
        """Add to the report."""
        self.report |= parts
        if self._file:
            write_atomically(self._file, json.dumps(self.report, indent=2) + "\n")


def listing(home: Path) -> str:
    """Digest the names, sizes and times of the files that a path is or holds."""
    files = [x for x in (home, *sorted(home.rglob("*"))) if x.is_file()]
    about = [(str(x), x.stat().st_size, x.stat().st_mtime_ns) for x in files]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
