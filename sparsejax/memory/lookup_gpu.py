"""The search of a lookup on Hopper GPUs, by the kernel of ``pallas_kernels.gpu``."""

from pallas_kernels import KernelError
from pallas_kernels.gpu import device
from pallas_kernels.gpu.lookup import MOST, best
from sparsejax.compat import HAS_MOSAIC_GPU
from sparsejax.memory.lookup import candidates
from sparsejax.typing import Array, Float, Int

__all__ = ["mosaic_gpu"]


def mosaic_gpu(
    rows: Float[Array, "h n r"], columns: Float[Array, "h n r"], *, k: int
) -> Int[Array, "h n k"]:
    """Take the best of each half, and of the pairs that can win, without sorting.

    Raises:
        KernelError: if there is no Hopper GPU, or ``k`` is more than the kernel finds.
    """
    if k > MOST:
        raise KernelError(
            f"implementation='mosaic_gpu' with k={k}: the kernel finds up to {MOST}"
            " slots; use 'xla'"
        )
    if reason := device.obstacle(supported=HAS_MOSAIC_GPU):
        raise KernelError(f"implementation='mosaic_gpu' {reason}")
    heads, n, r = rows.shape
    ranks = min(k, r)
    a, b = candidates(k, ranks)
    (rows, i), (columns, j) = (
        best(x.reshape(heads * n, r), k=ranks) for x in (rows, columns)
    )
    found = best(rows[:, a] + columns[:, b], i[:, a] * r + j[:, b], k=k)
    return found.names.reshape(heads, n, k)
