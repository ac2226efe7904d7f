"""What is specific to a batch: the slots that it reads and that other text does not.

Finetuning a memory changes those alone, so that what it knew stays as it was. Reads of
a table (``sparsejax.memory.table.Reads``) go in; reads of the chosen rows come out.
"""

import jax
import jax.numpy as jnp

from sparsejax.memory.table import Reads
from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["most_specific", "rarity", "read_counts"]


def read_counts(reads: Reads, *, layers: int, slots: int) -> Float[Array, "l m"]:
    """Count how often each row is read by tokens that have a gradient."""
    # Of a bag it is in the vectors, of products it is the weights.
    felt = jnp.any(reads.vectors != 0, axis=-1) & jnp.any(reads.weights != 0, axis=-1)
    felt = jnp.broadcast_to(felt[:, None].astype(jnp.float32), reads.ids.shape)
    counts = jnp.zeros(layers * slots).at[reads.ids].add(felt, mode="drop")
    return counts.reshape(layers, slots)


def rarity(
    seen: Float[Array, "l m"] | Int[Array, "l m"], batches: int
) -> Float[Array, "l m"]:
    """Inverse frequency ``log((batches + 1) / (seen + 1))``; 0 if all have read a row.

    Args:
        seen: batches of other text that have read each row.
        batches: that there were.

    Source: Lin et al. 2025, arXiv:2510.15103, Sec. 3.
    """
    return jnp.log((batches + 1.0) / (seen.astype(jnp.float32) + 1.0))


def most_specific(reads: Reads, rare: Float[Array, "l m"], *, top: int) -> Reads:
    """Keep the reads of the ``top`` rows of each layer that are most a batch's own.

    A row's score is its share of the batch's reads times its rarity; ties go to the
    lower row. With ``top`` rows or fewer in a layer, all are kept. Reads by tokens
    without a gradient are none.

    Source: Lin et al. 2025, arXiv:2510.15103, Sec. 3.
    """
    layers, slots = rare.shape
    counts = read_counts(reads, layers=layers, slots=slots)
    score = counts / jnp.maximum(counts.sum(), 1) * rare
    # What nobody reads is no candidate, however rare; a row that all text reads is.
    score = jnp.where(counts > 0, score, -1.0)
    _, best = jax.lax.top_k(score, min(top, slots))
    flat = best + slots * jnp.arange(layers, dtype=best.dtype)[:, None]
    chosen: Bool[Array, " n"] = jnp.zeros(layers * slots, bool).at[flat].set(True)
    chosen &= counts.reshape(-1) > 0
    kept = chosen.at[reads.ids].get(mode="fill", fill_value=False)
    return reads._replace(ids=jnp.where(kept, reads.ids, layers * slots))
