"""Attention over live blocks as TPU kernels: one grid step for each pair of blocks.

Heads that share lists become parts of the grid, heads with lists of their own become
rows of one list; either way a key block is fetched by one integer and grouped heads
cost nothing. Where the query heads of a group share a list they are packed into one
query block, which for a single token of cached decoding is all of its rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tpu import backward, forward
from pallas_kernels.tpu.blocks import GRANTS, Tensors, Tiling
from pallas_kernels.tpu.interpreter import is_interpreted
from pallas_kernels.tpu.pairs import EMPTY, FULL, PARTIAL, Rows, pair_list
from sparsejax.attention import lists as ls
from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.restrict import restrict
from sparsejax.attention.target import platform
from sparsejax.attention.xla import _alike
from sparsejax.typing import Array, Float

__all__ = ["mosaic_tpu"]

PAIRS = 130_000  # that fit into the scalar memory of every generation
PACKED = 512  # queries of a block, as far as heads are packed into it
SUBLANES, LANES = 8, 128  # of a vector register; blocks are padded to whole sublanes

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
        ValueError: where there is no TPU, for dtypes other than bfloat16 and float32,
            for query blocks of few rows, and for lists that do not fit the chip.
    """
    if segments is not None:
        mask = restrict(mask, segments)
    plan = _plan(q, k, mask, scale, softcap)
    _check(q, plan)
    # Under a mesh: gradients of what was gathered are summed where it was gathered.
    q, k, v, bias = _alike((q, k, v, bias), q, k, v, bias, mask, segments)
    return _attend(q, k, v, bias, mask, segments, plan)


class _Limit(NamedTuple):
    """Into how many calls a list is cut, and what bounds the pairs of each."""

    parts: int
    capacity: int


class _Plan(NamedTuple):
    """How "b t h c" and "b s g c" become the kernels' parts and blocks."""

    heads: tuple[int, int, int]  # sharing lists, with own lists, packed into a block
    height: int  # rows of a query block
    in_place: bool  # whether keys and values are read where they are
    tiling: Tiling
    rows: _Limit
    columns: _Limit

    def queries(self, x: Array, fill: float = 0.0) -> Array:
        """[b, t, h, c] to [o, r, q, c]."""
        (apart, own), (outer, inner, packed) = self.tiling.batches, self.heads
        rows, block_q = self.tiling.rows, self.tiling.block_q
        x = _pad(x, 1, rows * block_q, fill)
        x = x.reshape(apart, own, rows, block_q, outer, inner, packed, -1)
        x = x.transpose(0, 4, 1, 5, 2, 6, 3, 7)
        x = x.reshape(apart * outer, own * inner * rows, packed * block_q, -1)
        return _pad(x, 2, self.height, fill)

    def from_queries(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[o, r, q, c] to [b, t, h, c]."""
        (apart, own), (outer, inner, packed) = self.tiling.batches, self.heads
        rows, block_q = self.tiling.rows, self.tiling.block_q
        x = x[:, :, : packed * block_q]
        x = x.reshape(apart, outer, own, inner, rows, packed, block_q, -1)
        x = x.transpose(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(shape[0], rows * block_q, *shape[2:])[:, : shape[1]]

    def kv(self, x: Array) -> Array:
        """[b, s, g, c] to [o, r, k, c]."""
        (apart, own), (outer, inner) = self.tiling.batches, self.tiling.keys
        columns, block_kv = self.tiling.columns, self.tiling.block_kv
        x = _pad(x, 1, columns * block_kv)
        x = x.reshape(apart, own, columns, block_kv, outer, inner, -1)
        x = x.transpose(0, 4, 1, 5, 2, 3, 6)
        x = x.reshape(apart * outer, own * inner * columns, block_kv, -1)
        return _pad(x, 2, self.tiling.depth)

    def from_kv(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[o, r, k, c] to [b, s, g, c]."""
        (apart, own), (outer, inner) = self.tiling.batches, self.tiling.keys
        columns, block_kv = self.tiling.columns, self.tiling.block_kv
        x = x[:, :, :block_kv].reshape(apart, outer, own, inner, columns, block_kv, -1)
        x = x.transpose(0, 2, 4, 5, 1, 3, 6)
        return x.reshape(shape[0], columns * block_kv, *shape[2:])[:, : shape[1]]


def _plan(
    q: Array, k: Array, mask: BlockMask, scale: float, softcap: float | None
) -> _Plan:
    (b, _, h, c), g, grid = q.shape, k.shape[2], mask.grid
    own, inner = mask.ids.shape[:2]
    packed = 1
    if mask.elements is not None:
        own, inner = max(own, len(mask.elements)), max(inner, mask.elements.shape[1])
    elif inner == 1:
        fitting = max(1, PACKED // grid.block_q)
        packed = max(
            p for p in range(1, h // g + 1) if h // g % p == 0 and p <= fitting
        )
    shared = inner == 1
    heads = (h // packed, 1, packed) if shared else (1, h, 1)
    keys = (g, 1) if shared else (1, g)
    tiling = Tiling(
        batches=(b // own, own),
        heads=inner,
        keys=keys,
        rows=grid.rows,
        columns=grid.columns,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        depth=_round_up(grid.block_kv),
        kv_len=grid.kv_len,
        scale=scale,
        softcap=softcap,
        rules=mask.patterns,
    )
    # Blocks of memory begin and end where its tiles do; 32 bytes by 128 lanes.
    whole = grid.kv_len % grid.block_kv == 0
    in_place = whole and grid.block_kv * k.dtype.itemsize % 32 == 0
    rows, columns = _limits(mask, own * inner, own * keys[1])
    return _Plan(
        heads=heads,
        height=_round_up(packed * grid.block_q),
        in_place=in_place and (c % LANES == 0 or g == 1),
        tiling=tiling,
        rows=rows,
        columns=columns,
    )


def _limits(mask: BlockMask, lists: int, key_lists: int) -> tuple[_Limit, _Limit]:
    """Cut the lists so that each call's pairs fit into scalar memory."""
    grid = mask.grid
    rows, columns = lists * grid.rows, key_lists * grid.columns
    live = rows * mask.ids.shape[-1]
    if not ls.is_traced(mask.count):
        copies = rows // np.asarray(mask.count).size
        live = int(np.asarray(mask.count).sum()) * copies

    def limit(size: int, widest: int, name: str) -> _Limit:
        for parts in (n for n in range(1, size + 1) if size % n == 0):
            some = size // parts
            # Each row has a pair even if it has nothing live.
            capacity = min(live + some, some * max(widest, 1))
            if capacity <= PAIRS:
                return _Limit(parts, capacity)
        raise ValueError(
            f"a {name} block has up to {widest} live blocks, and a TPU call takes at"
            f" most {PAIRS} pairs; choose larger blocks"
        )

    widest = mask.ids.shape[-1]
    readers = lists // key_lists * grid.rows
    return limit(rows, widest, "query"), limit(columns, readers, "key")


def _check(q: Array, plan: _Plan) -> None:
    if q.dtype not in ("bfloat16", "float32"):
        raise ValueError(
            f"{q.dtype}: TPU kernels compute in bfloat16 and float32; cast to one"
        )
    tiling, (*_, packed) = plan.tiling, plan.heads
    if tiling.rows > 1 and packed * tiling.block_q < SUBLANES:
        raise ValueError(
            f"block_q={tiling.block_q} with {packed} heads packed into a block: a TPU"
            f" block needs {SUBLANES} rows; coarsen the mask, mask.coarsened(8) say"
        )
    if platform() != "tpu" and not is_interpreted():
        raise ValueError(
            f"implementation='mosaic_tpu' needs a TPU, and this is for {platform()};"
            " choose 'xla', or run under pallas_kernels.tpu.interpreter.interpreted()"
        )


def _rows(mask: BlockMask, plan: _Plan) -> Rows:
    """The live key blocks of every query block, numbered as the kernels see them."""
    own, inner = plan.tiling.batches[1], plan.tiling.heads
    lead, key_heads = (own, inner, plan.tiling.rows), plan.tiling.keys[1]
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


def _columns(rows: Rows, plan: _Plan) -> Rows:
    """The same pairs by key block, the full ones first."""
    blocks = plan.tiling.batches[1] * plan.tiling.keys[1] * plan.tiling.columns
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


def _operands(q, k, v, bias, mask, segments, plan: _Plan) -> Tensors:
    """Everything in blocks, except for what only the backward pass has."""
    b, t, h, _ = q.shape
    s, g = k.shape[1:3]
    own = keys = None
    if segments is not None:
        own = jnp.broadcast_to(segments.q[..., None, None], (b, t, h, 1))
        keys = jnp.broadcast_to(segments.kv[..., None, None], (b, s, g, 1))
    return Tensors(
        q=plan.queries(q),
        k=k.reshape(*k.shape[:2], -1) if plan.in_place else plan.kv(k),
        v=v.reshape(*v.shape[:2], -1) if plan.in_place else plan.kv(v),
        q_segments=None if own is None else plan.queries(own).mT,
        kv_segments=None if keys is None else plan.kv(keys).mT,
        bias=None if bias is None else plan.kv(bias.mT[..., None]).mT,
        grants=_grants(mask, q.shape, plan),
        elements=_elements(mask, plan),
    )


def _grants(mask: BlockMask, shape: tuple[int, ...], plan: _Plan) -> Array | None:
    """32 key blocks to a word, "o r w q"."""
    if mask.grants is None:
        return None
    (b, _, h, _), columns = shape, plan.tiling.columns
    words = -(-columns // GRANTS)
    bits = _pad(jnp.asarray(mask.grants).astype("uint32"), 3, words * GRANTS)
    bits = bits.reshape(*bits.shape[:3], words, GRANTS)
    place = jnp.arange(GRANTS, dtype="uint32")
    packed = (bits << place[None, None, None, None]).sum(-1, dtype="uint32")
    packed = jax.lax.bitcast_convert_type(packed, "int32").transpose(0, 2, 1, 3)
    packed = jnp.broadcast_to(packed, (b, packed.shape[1], h, words))
    return plan.queries(packed).mT


def _elements(mask: BlockMask, plan: _Plan) -> Array | None:
    """Tiles of the element mask, "b h i j k q"."""
    if mask.elements is None:
        return None
    tiling, x = plan.tiling, jnp.asarray(mask.elements)
    sizes = tiling.rows, tiling.block_q, tiling.columns, tiling.block_kv
    x = x.reshape(*x.shape[:2], *sizes).transpose(0, 1, 2, 4, 5, 3)
    return _pad(_pad(x.astype("int8"), 4, plan.tiling.depth), 5, plan.height)


def _run(kernel, rows: Rows, tensors: Tensors, mask, plan: _Plan, *, by_key=False):
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
        names = _KEY_SIDE[2 * plan.in_place :] if by_key else _QUERY_SIDE
        own = {name: cut(getattr(tensors, name), 1) for name in names}
        where = jnp.stack([offset, part * size])
        inputs = _alike((pairs, where, tensors._replace(**own)), rows, tensors, mask)
        if by_key:
            return kernel(*inputs, plan.tiling, blocks=size)
        return kernel(*inputs, plan.tiling)

    if parts == 1:
        return call(jnp.int32(0))
    outputs = jax.lax.map(call, jnp.arange(parts, dtype="int32"))
    return [x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in outputs]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, bias, mask, segments, plan) -> Attended:
    return _forward(q, k, v, bias, mask, segments, plan)[0]


def _forward(q, k, v, bias, mask, segments, plan: _Plan):
    tensors = _operands(q, k, v, bias, mask, segments, plan)
    values, lse = _run(forward.forward, _rows(mask, plan), tensors, mask, plan)
    lse = plan.from_queries(lse.mT, (*q.shape[:3], 1))[..., 0].mT
    attended = Attended(plan.from_queries(values, q.shape), lse)
    return attended, (q, k, v, bias, mask, segments, attended)


def _backward(plan: _Plan, saved, cotangent: Attended):
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


def _round_up(size: int) -> int:
    return -(-size // SUBLANES) * SUBLANES


def _pad(x: Array, axis: int, length: int, fill: float = 0.0) -> Array:
    edges = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, edges, constant_values=np.asarray(fill, x.dtype))
