"""The switch that runs TPU kernels on machines without a TPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import KernelError

__all__ = ["interpreted", "is_interpreted", "needs_tpu"]

_ON: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextmanager
def interpreted(*, simulated: bool = False, **options: Any) -> Iterator[None]:
    """Evaluate every TPU kernel that is traced inside, instead of compiling it.

    Args:
        simulated: model the memories of a TPU too, which is slow, but sees races and
            reads out of bounds.
        options: of ``jax.experimental.pallas.tpu.InterpretParams``, if simulated.
    """
    mode: Any = pltpu.InterpretParams(**options) if simulated else True
    token = _ON.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(mode):
            yield
    except BaseException:
        # The simulator keeps its memory over an exception, and the next run fails.
        pltpu.reset_tpu_interpret_mode_state()
        raise
    finally:
        _ON.reset(token)


def is_interpreted() -> bool:
    """Whether kernels traced here are evaluated."""
    return _ON.get()


def needs_tpu(platform: str) -> None:
    """Refuse a platform for which kernels are neither compiled nor evaluated.

    Raises:
        KernelError: if it is no TPU, outside of ``interpreted``.
    """
    if platform != "tpu" and not is_interpreted():
        raise KernelError(
            f"implementation='mosaic_tpu' needs a TPU, and this is for {platform};"
            " choose 'xla', or trace under pallas_kernels.tpu.interpreted()"
        )
