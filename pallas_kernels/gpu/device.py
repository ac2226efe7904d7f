"""The device that kernels are for: that of the ambient mesh, or the first one here."""

import re
from typing import Any

import jax

from pallas_kernels.gpu.interpreter import is_interpreted

__all__ = ["obstacle", "programs"]

# Interpreted programs run one after the other: a few show that they share the work.
INTERPRETED = 3


def obstacle(*, supported: bool) -> str | None:
    """Say why kernels cannot run on it; None if they can.

    Args:
        supported: whether this JAX has what they are written in.
    """
    kind = _device().device_kind
    if is_interpreted() or (supported and re.search(r"\b(GH|H)\d+", kind)):
        return None
    return (
        f"on {kind} with JAX {jax.__version__}: needs a Hopper GPU (H100, H200) and JAX"
        " 0.11; use 'xla', or, to test on a CPU, trace under"
        " pallas_kernels.gpu.interpreted()"
    )


def programs() -> int:
    """One for each multiprocessor."""
    if is_interpreted():
        return INTERPRETED
    device = _device()
    return getattr(device, "num_cores", None) or device.core_count


def _device() -> Any:  # abstract or present
    mesh = jax.sharding.get_abstract_mesh()
    described = None if mesh.empty else mesh.abstract_device
    return described or jax.devices()[0]
