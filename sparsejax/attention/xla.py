"""Attention over live blocks in plain XLA, written to be fast on a CPU.

No score matrix exists, the time follows the listed keys, and the backward pass adds dK
and dV in place. Three paths, by the mask's blocks: the usual one, here, walks the lists
row by row, ``ids[:full]`` without and ``ids[full:count]`` with the element rule, with
an online softmax. Where every query has a list of its own, ``key_major`` makes tiles of
the queries that read the same block. Where blocks are single keys or nearly so, or the
queries few, ``gathered`` fetches each row's keys. To fetch one costs as much as to see
some twenty in a dense tile, so longer lists of single keys become tiles with elements.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.attention import gathered, key_major
from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.restrict import restrict
from sparsejax.attention.rows import (
    FLOOR,
    Inputs,
    Row,
    Score,
    backward_rows,
    gradients,
    key_segments,
    product,
    table,
)
from sparsejax.attention.rows import alike as _alike
from sparsejax.attention.rows import pad as _pad  # noqa: F401
from sparsejax.typing import Array, Float

__all__ = ["xla"]

SMALL_Q, SMALL_KV = 8, 16  # blocks below these are gathered, not walked
FETCH = 16  # keys of a dense tile that cost as much as one that is fetched
TILE = 128
ELEMENTS = 2**29  # bytes that the rule of such tiles may take


def xla(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    v: Float[Array, "b s g c"],
    mask: BlockMask,
    *,
    scale: float,
    softcap: float | None = None,
    segments: Segments | None = None,
    bias: Float[Array, "b g s"] | None = None,
) -> Attended:
    """Softmax over the live blocks; values come back in float32."""
    if segments is not None:
        mask = restrict(mask, segments)
    mask = suited(mask)
    bias = None if bias is None else bias.mT[..., None]
    # Under a mesh: gradients of what was gathered are summed where it was gathered.
    q, k, v, bias = _alike((q, k, v, bias), q, k, v, mask, segments, bias)
    return _attend(q, k, v, bias, (mask, segments), Score(scale, softcap))


def path(mask: BlockMask) -> Any:
    """The pair of passes that suits a mask's blocks."""
    few = mask.block_q < SMALL_Q
    if few and mask.block_kv >= SMALL_KV and mask.grid.rows > SMALL_Q:
        return key_major.forward, key_major.backward
    narrow = mask.ids.shape[-1] < mask.grid.columns
    if mask.block_kv < SMALL_KV or (few and narrow):
        return gathered.forward, gathered.backward
    return _forward, _backward


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
def _attend(q, k, v, bias, where, score) -> Attended:
    mask, segments = where
    forward, _ = path(mask)
    return forward(Inputs(q, k, v, bias, mask, segments, score))


def _attend_forward(q, k, v, bias, where, score):
    mask, segments = where
    inputs = Inputs(q, k, v, bias, mask, segments, score)
    attended = path(mask)[0](inputs)
    return attended, (inputs[:-1], attended)


def _attend_backward(score, saved, cotangent: Attended):
    arrays, attended = saved
    inputs = Inputs(*arrays, score)
    _, backward = path(inputs.mask)
    return (*gradients(inputs, *backward(inputs, attended, cotangent)), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _visible(row: Row, block: Array, mask: BlockMask, key_segments: Any) -> Array:
    """The element rule of one block, [B, 1, 1, block_q, block_kv]."""
    bq, bk = mask.block_q, mask.block_kv
    i = row.top + jnp.arange(bq, dtype="int32")[:, None]
    j = block * bk + jnp.arange(bk, dtype="int32")[None]
    allowed = jnp.broadcast_to(j < mask.kv_len, (bq, bk))
    if row.choice is not None:
        branches = [functools.partial(p, i, j) for p in mask.patterns]
        allowed = allowed & jax.lax.switch(row.choice, branches)
    elif mask.patterns:
        allowed = allowed & mask.patterns[0](i, j)
    if row.elements is not None:
        tile = jax.lax.dynamic_slice_in_dim(row.elements, block * bk, bk, axis=1)
        allowed = allowed & tile
    if row.grants is not None:
        allowed = allowed & row.grants[:, block][:, None]
    allowed = allowed[None]
    if row.segments is not None:
        keys = jax.lax.dynamic_slice_in_dim(
            key_segments[row.batch], block * bk, bk, axis=1
        )
        own = row.segments[:, :, None]
        allowed = allowed & (own == keys[:, None, :]) & (own != 0)
    return allowed[:, None, None]


def _walk(row: Row, step: Any, state: Any) -> Any:
    """Visit the row's blocks, the full ones without the element rule."""
    state = jax.lax.fori_loop(
        0, row.full, lambda n, s: step(row.ids[n], s, ruled=False), state
    )
    return jax.lax.fori_loop(
        row.full, row.count, lambda n, s: step(row.ids[n], s, ruled=True), state
    )


def _masked(logits: Array, visible: Array) -> Array:
    """Hide elements of [B, G, Q, K] scores by a [B, 1, 1, block_q, K] rule."""
    split = (*logits.shape[:2], -1, *visible.shape[-2:])
    return jnp.where(visible, logits.reshape(split), -jnp.inf).reshape(logits.shape)


def _forward(inputs: Inputs) -> Attended:
    layout, score, shape = inputs.layout, inputs.score, inputs.q.shape
    keys, values, biases = jax.tree.map(layout.kv_rows, inputs[1:4])
    q_rows = layout.q_rows(inputs.q, inputs.k.shape[2])
    numbers = key_segments(inputs)

    def visit(carry, each):
        row, queries = each

        def step(block, state, *, ruled):
            top, total, out = state
            at = row.key_base + block
            logits = score.logits(product(queries, keys[at], "bgqc,bgkc->bgqk"))
            logits = logits if biases is None else logits + biases[at].mT
            if ruled:
                logits = _masked(logits, _visible(row, block, inputs.mask, numbers))
            higher = jnp.maximum(top, logits.max(axis=-1))
            weights = jnp.exp(logits - higher[..., None])
            kept = jnp.exp(top - higher)
            tile = values[at]
            update = product(weights.astype(tile.dtype), tile, "bgqk,bgkc->bgqc")
            # A product with ones: for a sum XLA would compute the exponentials twice.
            ones = jnp.ones((*weights.shape[:2], weights.shape[-1]))
            total = total * kept + product(weights, ones, "bgqk,bgk->bgq")
            return higher, total, out * kept[..., None] + update

        lead = queries.shape[:-1]
        start = jnp.full(lead, FLOOR), jnp.zeros(lead), jnp.zeros(queries.shape)
        top, total, out = _walk(row, step, _alike(start, inputs, row))
        seen = total > 0
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
        return carry, (out / jnp.where(seen, total, 1)[..., None], lse[..., None])

    _, (out, lse) = jax.lax.scan(visit, (), (table(inputs), q_rows))
    lse = layout.from_q_rows(lse, (*shape[:3], 1))[..., 0]
    return Attended(layout.from_q_rows(out, shape), lse.mT)


def _backward(inputs: Inputs, attended: Attended, cotangent: Attended) -> tuple:
    layout, score, dtype = inputs.layout, inputs.score, inputs.q.dtype
    keys, values, biases = jax.tree.map(layout.kv_rows, inputs[1:4])
    numbers = key_segments(inputs)

    def visit(carry, each):
        row, queries, dout, delta, lse = each

        def step(block, state, *, ruled):
            dq, dk, dv, dbias = state
            at = row.key_base + block
            logits = score.logits(product(queries, keys[at], "bgqc,bgkc->bgqk"))
            slope = score.slope(logits)
            logits = logits if biases is None else logits + biases[at].mT
            if ruled:
                logits = _masked(logits, _visible(row, block, inputs.mask, numbers))
            weights = jnp.exp(logits - lse)
            dweights = product(dout, values[at], "bgqc,bgkc->bgqk")
            dlogits = weights * (dweights - delta)
            if biases is not None:
                dbias = dbias.at[at].add(dlogits.sum(axis=2)[..., None])
            dscores = (dlogits * slope).astype(dtype)
            dq = dq + product(dscores, keys[at], "bgqk,bgkc->bgqc")
            dk = dk.at[at].add(product(dscores, queries, "bgqk,bgqc->bgkc"))
            weights = weights.astype(dtype)
            dv = dv.at[at].add(product(weights, dout, "bgqk,bgqc->bgkc"))
            return dq, dk, dv, dbias

        start = _alike(jnp.zeros(queries.shape), inputs, cotangent)
        dq, *carry = _walk(row, step, (start, *carry))
        return tuple(carry), dq

    each = table(inputs), *backward_rows(inputs, attended, cotangent)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), (keys, values, biases))
    zeros = _alike(zeros, inputs, cotangent)
    (dk, dv, dbias), dq = jax.lax.scan(visit, zeros, each)
    return dq, dk, dv, dbias
