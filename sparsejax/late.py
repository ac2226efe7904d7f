"""Functions whose modules are imported when they are first called."""

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["late"]


def late(module: str, name: str) -> Callable[..., Any]:
    """Stand for a function of a module that takes seconds to import.

    What makes kernels for a TPU or a GPU does; most programs call none of them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call
