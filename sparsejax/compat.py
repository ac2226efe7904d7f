"""Differences between the supported JAX lines; nowhere else may ask for a version."""

import jax

JAX_VERSION: tuple[int, ...] = jax.__version_info__

# The interpreter of Mosaic GPU kernels runs what ours need from this line on.
HAS_GPU_INTERPRETER = JAX_VERSION >= (0, 12)

# What the Mosaic GPU kernels are written in exists, and compiles, from this line on.
HAS_MOSAIC_GPU = JAX_VERSION >= (0, 11)
