"""Marks of tests that evaluate kernels on machines without their hardware."""

import pytest

from sparsejax.compat import HAS_GPU_INTERPRETER

__all__ = ["DEADLINE", "GPU", "gpu_interpreted"]

# A deadlock would wait for ever, and an interpreter remembers one that has failed.
DEADLINE = [pytest.mark.timeout(180), pytest.mark.usefixtures("clean_interpreter")]
gpu_interpreted = pytest.mark.skipif(
    not HAS_GPU_INTERPRETER, reason="this JAX cannot interpret GPU kernels"
)
GPU = pytest.param("mosaic_gpu", marks=gpu_interpreted)
