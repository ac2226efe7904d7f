"""Attention over live blocks in plain XLA, written to be fast on a CPU.

Heads and batch elements that share a mask row are processed together, so everything is
first laid out as rows: one row is (batch or 1, head or 1, query block), and a key block
is one integer into all key blocks. Each row walks its own list, ``ids[:full]`` without
and ``ids[full:count]`` with the element rule, with an online softmax; no score matrix
exists and the time follows the number of live blocks. The backward pass walks the same
lists once and adds dK and dV in place.

Symbols: N rows, B and G the batch elements and key heads of a row, Q query positions of
a row times the query heads of a group, K keys of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.restrict import restrict
from sparsejax.typing import Array, Float

__all__ = ["xla"]

_FLOOR = -1e30  # where the running maximum starts: finite, so that exp(-inf - m) is 0


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
    """Online softmax over the live blocks; values come back in float32."""
    if segments is not None:
        mask = restrict(mask, segments)
    bias = None if bias is None else bias.mT[..., None]
    # Under a mesh: gradients of what was gathered are summed where it was gathered.
    q, k, v, bias = _alike((q, k, v, bias), q, k, v, mask, segments, bias)
    return _attend(q, k, v, bias, mask, segments, _Score(scale, softcap))


class _Score(NamedTuple):
    """From a product of query and key to a logit."""

    scale: float
    softcap: float | None

    def logits(self, product: Array) -> Array:
        scaled = self.scale * product
        if self.softcap is None:
            return scaled
        return self.softcap * jnp.tanh(scaled / self.softcap)

    def slope(self, logits: Array) -> Array | float:
        """Derivative of the logits by the product."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - jnp.square(logits / self.softcap))


class _Layout(NamedTuple):
    """How "b t h c" becomes rows: ``batches * heads * rows`` rows share nothing."""

    batches: int  # batch elements with lists of their own, or 1
    heads: int  # heads with lists of their own, or 1
    keys: int  # key heads that need telling apart by the row, or 1
    rows: int
    columns: int
    block_q: int
    block_kv: int

    @classmethod
    def of(cls, mask: BlockMask, key_heads: int) -> "_Layout":
        batches, heads = mask.ids.shape[:2]
        keys = 1 if heads == 1 else key_heads
        grid = mask.grid
        sizes = (grid.rows, grid.columns, grid.block_q, grid.block_kv)
        return cls(batches, heads, keys, *sizes)

    def key_base(self) -> np.ndarray:
        """First key block of every row."""
        row = np.arange(self.batches * self.heads * self.rows)
        batch, head = np.divmod(row // self.rows, self.heads)
        head = head // (self.heads // self.keys)
        return ((batch * self.keys + head) * self.columns).astype("int32")

    def q_rows(self, x: Array, groups: int) -> Array:
        """[b, t, h, c] to [N, B, G, Q, c]."""
        b, _, h, c = x.shape
        x = _pad(x, 1, self.rows * self.block_q)
        group = groups // self.keys
        x = x.reshape(
            *(self.batches, b // self.batches, self.rows, self.block_q, self.heads),
            *(group, h // self.heads // group, c),
        )
        x = x.transpose(0, 4, 2, 1, 5, 6, 3, 7)
        return x.reshape(-1, *x.shape[3:5], x.shape[5] * self.block_q, c)

    def from_q_rows(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[N, B, G, Q, c] to [b, t, h, c]."""
        b, t, _, _ = shape
        lead = (self.batches, self.heads, self.rows, *x.shape[1:3])
        x = x.reshape(*lead, -1, self.block_q, x.shape[-1])
        x = x.transpose(0, 3, 2, 6, 1, 4, 5, 7)
        return x.reshape(b, self.rows * self.block_q, *shape[2:])[:, :t]

    def kv_rows(self, x: Array) -> Array:
        """[b, s, g, c] to [blocks, B, G, K, c]."""
        b, _, g, c = x.shape
        x = _pad(x, 1, self.columns * self.block_kv)
        x = x.reshape(
            *(self.batches, b // self.batches, self.columns, self.block_kv, self.keys),
            *(g // self.keys, c),
        )
        x = x.transpose(0, 4, 2, 1, 5, 3, 6)
        return x.reshape(-1, *x.shape[3:])

    def from_kv_rows(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[blocks, B, G, K, c] to [b, s, g, c]."""
        b, s, g, c = shape
        x = x.reshape(self.batches, self.keys, self.columns, *x.shape[1:])
        x = x.transpose(0, 3, 2, 5, 1, 4, 6)
        return x.reshape(b, self.columns * self.block_kv, g, c)[:, :s]


class _Row(NamedTuple):
    """What a row knows besides its arrays; leading axis N under ``scan``."""

    ids: Any
    count: Any
    full: Any
    key_base: Any  # first of its key blocks
    top: Any  # absolute position of its first query
    choice: Any  # which pattern, or None
    elements: Any  # [N, block_q, keys], or None
    grants: Any  # [N, block_q, key blocks], or None
    segments: Any  # [N, B, block_q], or None
    batch: Any  # which of the batch elements with own lists


def _rows(mask: BlockMask, layout: _Layout, segments: Segments | None) -> _Row:
    count = layout.batches * layout.heads * layout.rows
    place = np.arange(count)
    top = (place % layout.rows * layout.block_q).astype("int32") + jnp.asarray(
        mask.q_offset
    )
    choice = numbers = None
    head = place // layout.rows % layout.heads
    if mask.choice is not None:
        choice = jnp.asarray(mask.choice)[head]
    batch = place // layout.rows // layout.heads

    def of_rows(table: Any) -> Any:
        if table is None:
            return None
        b, h = table.shape[:2]
        tiles = jnp.asarray(table).reshape(b, h, layout.rows, layout.block_q, -1)
        return tiles[batch % b, head % h, place % layout.rows]

    if segments is not None:
        padded = _pad(segments.q, 1, layout.rows * layout.block_q)
        padded = padded.reshape(layout.batches, -1, layout.rows, layout.block_q)
        numbers = padded[batch, :, place % layout.rows]
    return _Row(
        ids=jnp.asarray(mask.ids).reshape(count, -1),
        count=jnp.asarray(mask.count).reshape(count),
        full=jnp.asarray(mask.full).reshape(count),
        key_base=jnp.asarray(layout.key_base()),
        top=top,
        choice=choice,
        elements=of_rows(mask.elements),
        grants=of_rows(mask.grants),
        segments=numbers,
        batch=jnp.asarray(batch.astype("int32")),
    )


def _visible(row: _Row, block: Array, mask: BlockMask, key_segments: Any) -> Array:
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


def _key_segments(segments: Segments | None, layout: _Layout) -> Array | None:
    if segments is None:
        return None
    padded = _pad(segments.kv, 1, layout.columns * layout.block_kv)
    return padded.reshape(layout.batches, -1, padded.shape[1])


def _walk(row: _Row, step: Any, state: Any) -> Any:
    """Visit the row's blocks, the full ones without the element rule."""
    state = jax.lax.fori_loop(
        0, row.full, lambda n, s: step(row.ids[n], s, ruled=False), state
    )
    return jax.lax.fori_loop(
        row.full, row.count, lambda n, s: step(row.ids[n], s, ruled=True), state
    )


def _product(a: Array, b: Array, spec: str) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _masked(logits: Array, visible: Array) -> Array:
    """Hide elements of [B, G, Q, K] scores by a [B, 1, 1, block_q, K] rule."""
    split = (*logits.shape[:2], -1, *visible.shape[-2:])
    return jnp.where(visible, logits.reshape(split), -jnp.inf).reshape(logits.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, bias, mask, segments, score) -> Attended:
    return _forward(q, k, v, bias, mask, segments, score)


def _forward(q, k, v, bias, mask, segments, score: _Score) -> Attended:
    layout = _Layout.of(mask, k.shape[2])
    keys, values, biases = jax.tree.map(layout.kv_rows, (k, v, bias))
    q_rows = layout.q_rows(q, k.shape[2])
    key_segments = _key_segments(segments, layout)

    def visit(carry, inputs):
        row, queries = inputs

        def step(block, state, *, ruled):
            top, total, out = state
            at = row.key_base + block
            logits = score.logits(_product(queries, keys[at], "bgqc,bgkc->bgqk"))
            logits = logits if biases is None else logits + biases[at].mT
            if ruled:
                logits = _masked(logits, _visible(row, block, mask, key_segments))
            higher = jnp.maximum(top, logits.max(axis=-1))
            weights = jnp.exp(logits - higher[..., None])
            kept = jnp.exp(top - higher)
            tile = values[at]
            update = _product(weights.astype(tile.dtype), tile, "bgqk,bgkc->bgqc")
            # A product with ones: for a sum XLA would compute the exponentials twice.
            ones = jnp.ones((*weights.shape[:2], weights.shape[-1]))
            total = total * kept + _product(weights, ones, "bgqk,bgk->bgq")
            return higher, total, out * kept[..., None] + update

        shape = queries.shape[:-1]
        start = (jnp.full(shape, _FLOOR), jnp.zeros(shape), jnp.zeros(queries.shape))
        top, total, out = _walk(row, step, _alike(start, q, k, v, bias, row))
        seen = total > 0
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
        return carry, (out / jnp.where(seen, total, 1)[..., None], lse[..., None])

    rows = _rows(mask, layout, segments)
    _, (out, lse) = jax.lax.scan(visit, (), (rows, q_rows))
    lse = layout.from_q_rows(lse, (*q.shape[:3], 1))[..., 0]
    return Attended(layout.from_q_rows(out, q.shape), lse.mT)


def _attend_forward(q, k, v, bias, mask, segments, score):
    attended = _forward(q, k, v, bias, mask, segments, score)
    return attended, (q, k, v, bias, mask, segments, attended)


def _attend_backward(score: _Score, saved, cotangent: Attended):
    q, k, v, bias, mask, segments, attended = saved
    layout = _Layout.of(mask, k.shape[2])
    keys, values, biases = jax.tree.map(layout.kv_rows, (k, v, bias))
    key_segments = _key_segments(segments, layout)
    dout = cotangent.values.astype("float32")
    # A row that saw nothing: with +inf, exp(logit - lse) is 0 and not NaN.
    blind = jnp.isinf(attended.lse)
    lse = jnp.where(blind, jnp.inf, attended.lse).mT
    dlse = jnp.where(blind, 0, cotangent.lse).mT
    delta = (dout * attended.values).sum(axis=-1) - dlse
    groups = k.shape[2]
    arrays = [
        layout.q_rows(x, groups)
        for x in (q, dout.astype(q.dtype), delta[..., None], lse[..., None])
    ]

    def visit(carry, inputs):
        row, queries, dout, delta, lse = inputs

        def step(block, state, *, ruled):
            dq, dk, dv, dbias = state
            at = row.key_base + block
            logits = score.logits(_product(queries, keys[at], "bgqc,bgkc->bgqk"))
            slope = score.slope(logits)
            logits = logits if biases is None else logits + biases[at].mT
            if ruled:
                logits = _masked(logits, _visible(row, block, mask, key_segments))
            weights = jnp.exp(logits - lse)
            dweights = _product(dout, values[at], "bgqc,bgkc->bgqk")
            dlogits = weights * (dweights - delta)
            if biases is not None:
                dbias = dbias.at[at].add(dlogits.sum(axis=2)[..., None])
            dscores = (dlogits * slope).astype(q.dtype)
            dq = dq + _product(dscores, keys[at], "bgqk,bgkc->bgqc")
            dk = dk.at[at].add(_product(dscores, queries, "bgqk,bgqc->bgkc"))
            weights = weights.astype(q.dtype)
            dv = dv.at[at].add(_product(weights, dout, "bgqk,bgqc->bgkc"))
            return dq, dk, dv, dbias

        start = _alike(jnp.zeros(queries.shape), q, k, v, row, cotangent)
        dq, *carry = _walk(row, step, (start, *carry))
        return tuple(carry), dq

    rows = _rows(mask, layout, segments)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), (keys, values, biases))
    zeros = _alike(zeros, q, k, v, bias, rows, cotangent)
    (dk, dv, dbias), dq = jax.lax.scan(visit, zeros, (rows, *arrays))
    return (
        layout.from_q_rows(dq, q.shape).astype(q.dtype),
        layout.from_kv_rows(dk, k.shape).astype(k.dtype),
        layout.from_kv_rows(dv, v.shape).astype(v.dtype),
        None if bias is None else layout.from_kv_rows(dbias, bias.shape),
        None,
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _alike(start: Any, *trees: Any) -> Any:
    """Mark constants as varying over the mesh axes over which any input varies."""
    names = set()
    for x in jax.tree.leaves(trees):
        names |= jax.typeof(x).manual_axis_type.varying
    return jax.tree.map(
        lambda x: jax.lax.pcast(
            x, tuple(names - jax.typeof(x).manual_axis_type.varying), to="varying"
        ),
        start,
    )


def _pad(x: Array, axis: int, length: int) -> Array:
    if x.shape[axis] == length:
        return x
    edges = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, edges)
