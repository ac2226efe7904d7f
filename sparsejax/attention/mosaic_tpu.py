"""Attention over live blocks as TPU kernels: one grid step for each pair of blocks.

Heads that share lists become parts of the grid, heads with lists of their own become
rows of one list; either way a key block is fetched by one integer and grouped heads
cost nothing. Where the query heads of a group share a list they are packed into one
query block, which for a single token of cached decoding is all of its rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import KernelError
from pallas_kernels.tpu import backward, forward, needs_tpu
from pallas_kernels.tpu.blocks import GRANTS, Tensors
from pallas_kernels.tpu.pairs import EMPTY, FULL, PARTIAL, RULES, Rows, pair_list
from sparsejax.attention import lists as ls
from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.restrict import restrict
from sparsejax.attention.tpu_plan import SUBLANES, Plan, pad, plan_of
from sparsejax.partition import alike, platform
from sparsejax.typing import Array, Float

__all__ = ["mosaic_tpu"]

_QUERY_SIDE = ("q", "do", "lse", "delta", "q_segments", "grants")
_KEY_SIDE = ("k", "v", "kv_segments", "bias")


def mosaic_tpu(
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
    """Online softmax over the live blocks on a TPU; values in the dtype of ``q``.

    Raises:
        KernelError: where there is no TPU, for dtypes other than bfloat16 and float32,
            for query blocks of few rows, and for lists that do not fit the chip.
    """
    if segments is not None:
        mask = restrict(mask, segments)
    plan = plan_of(q, k, mask, scale, softcap)
    _check(q, plan)
    # Under a mesh: gradients of what was gathered are summed where it was gathered.
    q, k, v, bias = alike((q, k, v, bias), q, k, v, bias, mask, segments)
    return _attend(q, k, v, bias, mask, segments, plan)


def _check(q: Array, plan: Plan) -> None:
    if q.dtype not in ("bfloat16", "float32"):
        raise KernelError(
            f"{q.dtype}: TPU kernels compute in bfloat16 and float32; cast to one"
        )
    tiling, (*_, packed) = plan.tiling, plan.heads
    if tiling.rows > 1 and packed * tiling.block_q < SUBLANES:
        raise KernelError(
            f"block_q={tiling.block_q} with {packed} heads packed into a block: a TPU"
            f" block needs {SUBLANES} rows; coarsen the mask, mask.coarsened(8) say"
        )
    if len(tiling.rules) > RULES:
        raise KernelError(
            f"heads follow {len(tiling.rules)} patterns, and a TPU call tells {RULES}"
            " apart; attend with some heads at a time"
        )
    needs_tpu(platform())


def _rows(mask: BlockMask, plan: Plan) -> Rows:
    """The live key blocks of every query block, numbered as the kernels see them."""
    own, inner = plan.batches[1], plan.tiling.heads
    lead, key_heads = (own, inner, plan.tiling.rows), plan.keys[1]
    ids, count = jnp.asarray(mask.ids), jnp.asarray(mask.count)
    kinds = ls.entry_kinds(mask.lists)
    batch = np.arange(own, dtype="int32")[:, None, None, None]
    head = np.arange(inner, dtype="int32")[None, :, None, None]
    key_list = batch * key_heads + head * key_heads // inner
    rule = jnp.zeros(1, "int32") if mask.choice is None else jnp.asarray(mask.choice)
    partial = PARTIAL + rule[None, :, None, None]
    named = jnp.where(kinds == ls.FULL, FULL, jnp.where(kinds > 0, partial, EMPTY))
    # Ids past the count may be anything.
    others = jnp.where(kinds > 0, ids, 0) + key_list * plan.tiling.columns
    width = ids.shape[-1]
    return Rows(
        start=jnp.arange(np.prod(lead), dtype="int32") * width,
        count=jnp.broadcast_to(count, lead).reshape(-1),
        others=jnp.broadcast_to(others, (*lead, width)).reshape(-1),
        kinds=jnp.broadcast_to(named, (*lead, width)).reshape(-1),
    )


def _columns(rows: Rows, plan: Plan) -> Rows:
    """The same pairs by key block, the full ones first."""
    blocks = plan.batches[1] * plan.keys[1] * plan.tiling.columns
    width = len(rows.others) // len(rows.count)
    row = jnp.repeat(jnp.arange(len(rows.count), dtype="int32"), width)
    order = jnp.where(rows.kinds == EMPTY, blocks, rows.others) * 2
    order = order - (rows.kinds == FULL).astype("int32")
    order, row, kinds = jax.lax.sort((order, row, rows.kinds), num_keys=1)
    column, block = (order + 1) // 2, jnp.arange(blocks, dtype="int32")
    start, end = (
        jnp.searchsorted(column, block, side=s).astype("int32")
        for s in ("left", "right")
    )
    return Rows(start, end - start, row, kinds)


def _operands(q, k, v, bias, mask, segments, plan: Plan) -> Tensors:
    """Everything in blocks, except for what only the backward pass has."""
    b, t, h, _ = q.shape
    s, g = k.shape[1:3]
    own = keys = None
    if segments is not None:
        own = jnp.broadcast_to(segments.q[..., None, None], (b, t, h, 1))
        keys = jnp.broadcast_to(segments.kv[..., None, None], (b, s, g, 1))
    return Tensors(
        q=plan.queries(q),
        k=plan.kv(k),
        v=plan.kv(v),
        q_segments=None if own is None else plan.queries(own).mT,
        kv_segments=None if keys is None else plan.kv(keys).mT,
        bias=None if bias is None else plan.kv(bias.mT[..., None]).mT,
        grants=_grants(mask, q.shape, plan),
        elements=_elements(mask, plan),
    )


def _grants(mask: BlockMask, shape: tuple[int, ...], plan: Plan) -> Array | None:
    """32 key blocks to a word, "o r w q"."""
    if mask.grants is None:
        return None
    (b, _, h, _), columns = shape, plan.tiling.columns
    words = -(-columns // GRANTS)
    bits = pad(jnp.asarray(mask.grants).astype("uint32"), 3, words * GRANTS)
    bits = bits.reshape(*bits.shape[:3], words, GRANTS)
    place = jnp.arange(GRANTS, dtype="uint32")
    packed = (bits << place[None, None, None, None]).sum(-1, dtype="uint32")
    packed = jax.lax.bitcast_convert_type(packed, "int32").transpose(0, 2, 1, 3)
    packed = jnp.broadcast_to(packed, (b, packed.shape[1], h, words))
    return plan.queries(packed).mT


def _elements(mask: BlockMask, plan: Plan) -> Array | None:
    """Tiles of the element mask, "b h i j k q"."""
    if mask.elements is None:
        return None
    tiling, x = plan.tiling, jnp.asarray(mask.elements)
    sizes = tiling.rows, tiling.block_q, tiling.columns, tiling.block_kv
    x = x.reshape(*x.shape[:2], *sizes).transpose(0, 1, 2, 4, 5, 3)
    return pad(pad(x.astype("int8"), 4, plan.depth), 5, plan.height)


def _run(kernel, rows: Rows, tensors: Tensors, mask, plan: Plan, *, by_key=False):
    """Build the pairs and walk them, in as many calls as it takes."""
    parts, capacity = plan.columns if by_key else plan.rows
    size = len(rows.count) // parts
    offset = jnp.asarray(mask.q_offset, "int32")

    def call(part: Any) -> Any:
        def cut(x: Any, axis: int) -> Any:
            if parts == 1 or x is None:
                return x
            return jax.lax.dynamic_slice_in_dim(x, part * size, size, axis)

        some = rows._replace(start=cut(rows.start, 0), count=cut(rows.count, 0))
        pairs = pair_list(some, capacity)
        names = _KEY_SIDE if by_key else _QUERY_SIDE
        own = {name: cut(getattr(tensors, name), 1) for name in names}
        where = jnp.stack([offset, part * size])
        inputs = alike((pairs, where, tensors._replace(**own)), rows, tensors, mask)
        return kernel(*inputs, plan.tiling)

    if parts == 1:
        return call(jnp.int32(0))
    outputs = jax.lax.map(call, jnp.arange(parts, dtype="int32"))
    return [x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in outputs]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, bias, mask, segments, plan) -> Attended:
    return _forward(q, k, v, bias, mask, segments, plan)[0]


def _forward(q, k, v, bias, mask, segments, plan: Plan):
    tensors = _operands(q, k, v, bias, mask, segments, plan)
    values, lse = _run(forward.forward, _rows(mask, plan), tensors, mask, plan)
    lse = plan.from_queries(lse.mT, (*q.shape[:3], 1))[..., 0].mT
    attended = Attended(plan.from_queries(values, q.shape), lse).named()
    return attended, (q, k, v, bias, mask, segments, attended)


def _backward(plan: Plan, saved, cotangent: Attended):
    q, k, v, bias, mask, segments, attended = saved
    do = cotangent.values
    blind = jnp.isinf(attended.lse)
    lse = jnp.where(blind, jnp.inf, attended.lse).mT[..., None]
    dlse = jnp.where(blind, 0, cotangent.lse).mT[..., None]
    products = do.astype("float32") * attended.values.astype("float32")
    delta = products.sum(axis=-1, keepdims=True) - dlse
    tensors = _operands(q, k, v, bias, mask, segments, plan)._replace(
        do=plan.queries(do),
        lse=plan.queries(lse, jnp.inf).mT,
        delta=plan.queries(delta).mT,
    )
    rows = _rows(mask, plan)
    (dq,) = _run(backward.by_queries, rows, tensors, mask, plan)
    dk, dv, *dbias = _run(
        backward.by_keys, _columns(rows, plan), tensors, mask, plan, by_key=True
    )
    if dbias:
        flat = plan.from_kv(dbias[0].mT, (*k.shape[:3], 1))
        dbias = [flat[..., 0].mT]
    return (
        plan.from_queries(dq, q.shape),
        plan.from_kv(dk, k.shape),
        plan.from_kv(dv, v.shape),
        dbias[0] if dbias else None,
        None,
        None,
    )


_attend.defvjp(_forward, _backward)
