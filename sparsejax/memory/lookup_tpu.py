"""The search of a lookup on TPUs, by the kernel of ``pallas_kernels.tpu.lookup``."""

import jax.numpy as jnp

from pallas_kernels import KernelError
from pallas_kernels.tpu.interpreter import needs_tpu
from pallas_kernels.tpu.lookup import TOKENS, best_pairs
from sparsejax.partition import platform
from sparsejax.typing import Array, Float, Int

__all__ = ["mosaic_tpu"]

MOST, WIDEST = 128, 4096  # slots of a token, and sub-keys of a half


def mosaic_tpu(
    rows: Float[Array, "h n r"], columns: Float[Array, "h n r"], *, k: int
) -> Int[Array, "h n k"]:
    """Passes over the scores of 128 tokens at a time, instead of sorting them.

    Raises:
        KernelError: where there is no TPU, and for what does not fit the kernel.
    """
    r = rows.shape[-1]
    if k > MOST or r > WIDEST:
        raise KernelError(
            f"implementation='mosaic_tpu' with k={k} and r={r}: the kernel finds up to"
            f" {MOST} slots among up to {WIDEST} sub-keys; use 'xla'"
        )
    needs_tpu(platform())
    n = rows.shape[1]
    halves = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -n % TOKENS)))
        for x in (rows, columns)
    )
    return best_pairs(*halves, k=k)[..., :n].swapaxes(1, 2)
