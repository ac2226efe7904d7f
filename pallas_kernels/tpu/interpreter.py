"""The switch that runs TPU kernels on machines without a TPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax.experimental.pallas import tpu as pltpu

__all__ = ["interpreted", "is_interpreted"]

_ON: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextmanager
def interpreted(**options: Any) -> Iterator[None]:
    """Run every TPU kernel traced inside in JAX's simulator of a TPU.

    Args:
        options: of ``jax.experimental.pallas.tpu.InterpretParams``.
    """
    token = _ON.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options)):
            yield
    except BaseException:
        # The simulator keeps its memory over an exception, and the next run fails.
        pltpu.reset_tpu_interpret_mode_state()
        raise
    finally:
        _ON.reset(token)


def is_interpreted() -> bool:
    """Whether kernels traced here would run in the simulator."""
    return _ON.get()
