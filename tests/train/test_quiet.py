import logging
import sys
from types import SimpleNamespace

import orbax.checkpoint as ocp
import pytest

from sparsejax.train.quiet import quieten_orbax


@pytest.fixture
def heard(monkeypatch):
    """What reaches the hook that was there before."""
    events = []
    monkeypatch.setattr(sys, "unraisablehook", events.append)
    logger = logging.getLogger("absl")
    filters = list(logger.filters)
    logger.filters.clear()
    quieten_orbax()
    quieten_orbax()
    yield events
    logger.filters[:] = filters


def coroutine_of(path):
    return SimpleNamespace(cr_code=SimpleNamespace(co_filename=path))


def event(thing, text="lost"):
    return SimpleNamespace(object=thing, exc_value=RuntimeError(text))


@pytest.mark.parametrize(
    ("thing", "text", "passes"),
    [
        (coroutine_of(ocp.__file__), "lost", False),
        (None, "Event loop is closed", False),
        (coroutine_of("/home/user/loop.py"), "lost", True),
        (None, "lost", True),
        (object(), "Event loop is closed", True),
    ],
)
def test_only_abandoned_reads_are_not_heard(heard, thing, text, passes):
    sys.unraisablehook(event(thing, text))
    assert len(heard) == passes


@pytest.mark.parametrize(
    ("path", "passes"), [(ocp.__file__, False), ("/home/user/train.py", True)]
)
def test_only_the_log_lines_of_orbax_are_dropped(heard, path, passes):
    record = logging.LogRecord("absl", logging.ERROR, path, 1, "text", (), None)
    assert bool(logging.getLogger("absl").filter(record)) == passes
