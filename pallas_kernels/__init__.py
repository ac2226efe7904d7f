"""Kernels: arrays in, arrays out. Nothing here imports anything but JAX."""
