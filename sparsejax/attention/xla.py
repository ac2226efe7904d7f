"""Attention over live blocks in plain XLA, written to be fast on a CPU.

No score matrix exists, the time follows the listed keys, and the backward pass adds dK
and dV in place. (One query has a row of scores, and unless its list is short it is best
served with all keys where they lie; what it does not see must be finite then.)
Three paths, by the mask's blocks: usually every row has its list ``walked``, some
blocks at a step, with an online softmax. Where every query has a list of its own,
``key_major`` makes tiles of the queries that read the same block. Where blocks are
single keys or nearly so, or the queries few, ``gathered`` fetches each row's keys. To
fetch one costs as much as to see some twenty in a dense tile, so longer lists of single
keys become tiles with elements.
"""

import functools
from typing import Any

import jax

from sparsejax.attention import gathered, key_major, walked
from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.reference import reference
from sparsejax.attention.restrict import restrict
from sparsejax.attention.rows import Inputs, Score, gradients
from sparsejax.partition import alike
from sparsejax.typing import Array, Float

__all__ = ["xla"]

SMALL_Q, SMALL_KV = 8, 16  # blocks below these are gathered, not walked
FETCHED = 3  # whole blocks read where they lie that cost as much as one fetched
FETCH = 16  # keys of a dense tile that cost as much as one that is fetched
TILE = 128
ELEMENTS = 2**29  # bytes that the rule of such tiles may take


def xla(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    v: Float[Array, "b s g _"],
    mask: BlockMask,
    *,
    scale: float,
    softcap: float | None = None,
    segments: Segments | None = None,
    bias: Float[Array, "b g s"] | None = None,
) -> Attended:
    """Softmax over the live blocks; values come back in float32."""
    if mask.q_len == 1 and _rather_all(mask, k.shape[2]):
        more = {"segments": segments, "bias": bias}
        return reference(q, k, v, mask, scale=scale, softcap=softcap, **more)
    restricted = mask if segments is None else restrict(mask, segments)
    suit = suited(restricted)
    known, mask = mask if suit is restricted else suit, suit
    bias = None if bias is None else bias.mT[..., None]
    # Under a mesh: gradients of what was gathered are summed where it was gathered.
    q, k, v, bias = alike((q, k, v, bias), q, k, v, mask, segments, bias)
    # Chosen here, of lists as they were given: inside, and of segments, all are traced.
    together = q.shape[0] // mask.ids.shape[0] * known.ids.shape[0]
    static = Score(scale, softcap), walked.strides(known, (together, *q.shape[1:]))
    return _attend(q, k, v, bias, (mask, segments), static)


def _rather_all(mask: BlockMask, key_heads: int) -> bool:
    """Whether one query reads all keys sooner than those that its lists fetch."""
    fetched = max(mask.ids.shape[1], key_heads) * mask.ids.shape[-1]
    each = 1 if mask.block_kv < SMALL_KV else FETCHED
    return each * fetched >= key_heads * mask.grid.columns


def path(mask: BlockMask) -> Any:
    """The pair of passes that suits a mask's blocks."""
    few = mask.block_q < SMALL_Q
    if few and mask.block_kv >= SMALL_KV and mask.grid.rows > SMALL_Q:
        return key_major.forward, key_major.backward
    narrow = mask.ids.shape[-1] < mask.grid.columns
    if mask.block_kv < SMALL_KV or (few and narrow):
        return gathered.forward, gathered.backward
    return walked.forward, walked.backward


def suited(mask: BlockMask) -> BlockMask:
    """Make tiles of lists of single keys, where fetching these would cost more."""
    few = mask.grid.rows <= SMALL_Q or mask.block_kv >= SMALL_KV
    seldom = FETCH * mask.ids.shape[-1] < mask.grid.columns
    elements = mask.ids.shape[0] * mask.ids.shape[1] * mask.q_len * mask.kv_len
    if few or seldom or elements > ELEMENTS:
        return mask
    blocks = [max(1, TILE // n) * n for n in (mask.block_q, mask.block_kv)]
    return mask.coarsened(blocks[0], block_kv=blocks[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, bias, where, static) -> Attended:
    return _attend_forward(q, k, v, bias, where, static)[0]


def _attend_forward(q, k, v, bias, where, static):
    arrays = q, k, v, bias, *where
    inputs = Inputs(*arrays, *static)
    attended = path(inputs.mask)[0](inputs).named()
    return attended, (arrays, attended)


def _attend_backward(static, saved, cotangent: Attended):
    arrays, attended = saved
    inputs = Inputs(*arrays, *static)
    _, backward = path(inputs.mask)
    return (*gradients(inputs, *backward(inputs, attended, cotangent)), None)


_attend.defvjp(_attend_forward, _attend_backward)
