"""Compiling is what takes a test's time: of many alike, some run every time."""

import pytest

__all__ = ["slowly"]


def slowly(cases, *, but):
    """Parametrize over all cases; those not in ``but`` are for ``make test-slow``."""
    missing = set(but) - set(cases)
    assert not missing, f"no such cases: {missing}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[] if case in but else pytest.mark.slow,
        )
        for case in cases
    ]
