"""Lookups: queries and sub-keys in, the best slots of a memory and their scores out.

A product-key memory has ``m = r * r`` slots. Slot ``i * r + j`` has the key that joins
sub-key ``i`` of the first half with sub-key ``j`` of the second, so its score is the
sum of two half scores and the best slots are found from ``2 * r`` products instead of
``r * r``. Lookups own no parameters; their scores have gradients, their ids have none.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sparsejax.config import choose
from sparsejax.late import late
from sparsejax.memory.sharded import per_token
from sparsejax.typing import Array, Float, Int

__all__ = ["IMPLEMENTATIONS", "Hits", "candidates", "product_key_top_k"]


class Hits(NamedTuple):
    """The slots that each head of each token reads, best first."""

    ids: Int[Array, "n h k"]
    scores: Float[Array, "n h k"]  # float32, descending


def product_key_top_k(
    queries: Float[Array, "n h c"],
    keys: Float[Array, "h 2 r c//2"],
    *,
    k: int,
    implementation: str = "xla",
) -> Hits:
    """Find the ``k`` best of all ``r * r`` slots, exactly; ties go to the lower id.

    A pair of sub-keys that are number ``a`` and ``b`` of their halves, from zero, is
    beaten by the ``(a + 1) * (b + 1) - 1`` pairs that are nowhere worse. Only pairs
    with ``(a + 1) * (b + 1) <= k`` are therefore compared: about ``k * log(k)`` of
    them, each of the ``r * r`` sums being one rounded float32 addition. The one freedom
    left: slots whose sums differ but round to the same, last chosen, score.

    Args:
        queries: the first half of ``c`` meets the first sub-key.
        keys: sub-keys of both halves, for each head its own.
        k: slots per head, at most ``r * r``.
        implementation: of the search among the scores, a name of ``IMPLEMENTATIONS``.
            Kernels have to be named until they have met their hardware.

    Raises:
        ValueError: if the widths do not match or ``k`` is out of range, and for an
            unknown implementation or one that cannot run.

    Source: Lample et al. 2019, arXiv:1907.05242, Sec. 3. Departure: the second search
    skips the pairs that cannot win.
    """
    _check(queries.shape, keys.shape, k)
    choose("implementation", implementation, IMPLEMENTATIONS)
    rows, columns = (
        _scores(half, keys[:, side])
        for side, half in enumerate(jnp.split(queries, 2, axis=-1))
    )
    halves = (jax.lax.stop_gradient(x) for x in (rows, columns))
    ids = per_token(partial(IMPLEMENTATIONS[implementation], k=k), *halves)
    ids = checkpoint_name(ids, "looked_up")  # few bytes, and a search to compute
    i, j = jnp.divmod(ids, keys.shape[2])
    scores = jnp.take_along_axis(rows, i, -1) + jnp.take_along_axis(columns, j, -1)
    return Hits(ids.swapaxes(0, 1), scores.swapaxes(0, 1))


def _check(queries: tuple[int, ...], keys: tuple[int, ...], k: int) -> None:
    if len(queries) != 3 or len(keys) != 4:
        raise ValueError(
            f"queries of shape {queries} and keys of shape {keys}: must be (n, h, c)"
            " and (h, 2, r, c/2); add the axis of heads"
        )
    heads, halves, r, width = keys
    if queries[1:] != (heads, 2 * width) or halves != 2:
        raise ValueError(
            f"queries of shape {queries} and keys of shape {keys}: heads must be equal,"
            " and c even and twice the last axis of the keys"
        )
    if r * r > np.iinfo(np.int32).max:
        raise ValueError(f"r={r} sub-keys: r * r slots must have int32 ids")
    if not 1 <= k <= r * r:
        raise ValueError(f"k={k}: must be in 1..{r * r}, the r * r slots for r={r}")


def _scores(
    queries: Float[Array, "n h c"], keys: Float[Array, "h r c"]
) -> Float[Array, "h n r"]:
    # Heads come first, as products leave them: turned about, they would be copied.
    return jnp.einsum("nhc,hrc->hnr", queries, keys, preferred_element_type="float32")


def _without_minus_zero(scores: Float[Array, "h n r"]) -> Float[Array, "h n r"]:
    # top_k puts 0 before -0, which would hide a tie.
    return jnp.where(scores == 0, 0, scores)


def candidates(k: int, ranks: int) -> np.ndarray:
    """All pairs of ranks that fewer than ``k`` other pairs dominate: ``[2, pairs]``."""
    a, b = np.indices((ranks, ranks))
    return np.stack(np.nonzero((a + 1) * (b + 1) <= k))


def xla(
    rows: Float[Array, "h n r"], columns: Float[Array, "h n r"], *, k: int
) -> Int[Array, "h n k"]:
    """Sort each half as far as need be, then the pairs that can win."""
    r = rows.shape[-1]
    ranks = min(k, r)
    a, b = candidates(k, ranks)
    (rows, i), (columns, j) = (
        jax.lax.top_k(_without_minus_zero(x), ranks) for x in (rows, columns)
    )
    sums = rows[..., a] + columns[..., b]
    ids = i[..., a] * r + j[..., b]
    return jax.lax.sort((-sums, ids), num_keys=2)[1][..., :k]


# The searches: ``(rows, columns, k=…) -> ids``.
IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": xla,
    "mosaic_tpu": late("sparsejax.memory.lookup_tpu", "mosaic_tpu"),
    "mosaic_gpu": late("sparsejax.memory.lookup_gpu", "mosaic_gpu"),
}
