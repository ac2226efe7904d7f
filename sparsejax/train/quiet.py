"""Orbax made to fail without noise; whoever calls it raises what went wrong."""

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["quieten_orbax"]


def quieten_orbax() -> None:
    """Drop Orbax's log lines and the cries of the reads that it abandons.

    It logs what it raises. When one piece of an array cannot be read, the reads of the
    other pieces are given up, and each prints a page when it is collected, at any later
    time. Nobody else's lines are touched; a second call changes nothing.
    """
    logger = logging.getLogger("absl")
    if _is_ours not in logger.filters:
        logger.addFilter(_is_ours)
        sys.unraisablehook = partial(_unless_abandoned, sys.unraisablehook)


def _is_ours(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _unless_abandoned(hook: Callable[[Any], Any], event: Any) -> None:
    code = getattr(event.object, "cr_code", None)
    abandoned = code is not None and "orbax" in code.co_filename
    late = event.object is None and str(event.exc_value) == "Event loop is closed"
    if not (abandoned or late):
        hook(event)
