"""The switch that runs GPU kernels on machines without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["interpreted", "is_interpreted"]

_ON: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextmanager
def interpreted(*, detect_races: bool = True, **options: Any) -> Iterator[None]:
    """Run kernels traced in here on the CPU, slowly, and watch their memory traffic.

    Args:
        detect_races: whether to raise on a data race.
        options: others of ``plgpu.InterpretGPUParams``.

    Raises:
        ValueError: if this JAX has no such interpreter.
    """
    mode = getattr(plgpu, "force_gpu_interpret_mode", None)
    params = getattr(plgpu, "InterpretGPUParams", None)
    if mode is None or params is None:
        raise ValueError(
            f"JAX {jax.__version__} cannot interpret GPU kernels: use 0.12"
        )
    token = _ON.set(True)
    try:
        with mode(params(detect_races=detect_races, **options)):
            yield
    finally:
        _ON.reset(token)


def is_interpreted() -> bool:
    """Whether ``interpreted`` is in force."""
    return _ON.get()
