"""Kernels: arrays in, arrays out. Nothing here imports anything but JAX."""

__all__ = ["KernelError"]


class KernelError(ValueError):
    """Kernels that were asked for by name cannot run here, or on such operands."""
