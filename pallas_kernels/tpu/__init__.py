"""TPU kernels: arrays in, arrays out.

Elsewhere they run in JAX's simulator of a TPU if traced under ``interpreted()``.
"""

from pallas_kernels.tpu.interpreter import interpreted, is_interpreted, needs_tpu

__all__ = ["interpreted", "is_interpreted", "needs_tpu"]
