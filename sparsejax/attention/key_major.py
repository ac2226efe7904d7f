"""Attention where every query has a list: queries that read a block become a tile.

Pairs of a row and a block are sorted by block and cut into tiles of rows that read the
same block, so that all products are between dense tiles. Each tile leaves the partial
softmax of its pairs, and a row joins those of its own. The time follows the pairs.

Source: Xiao et al. 2025, arXiv:2511.11571, Sec. 4. Departure: every pair's partial
result is kept until its row joins them, instead of being added in place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.attention.attended import Attended
from sparsejax.attention.rows import (
    FLOOR,
    Inputs,
    Row,
    backward_rows,
    beside,
    key_segments,
    product,
    table,
    taken,
    visible,
)
from sparsejax.partition import alike
from sparsejax.typing import Array

__all__ = ["backward", "forward"]

TILE = 128  # query positions of a tile


class _Plan(NamedTuple):
    """Tiles of pairs, those that exist first."""

    rows: Any  # [tiles, M] rows of a tile; the first one again where it ends
    real: Any  # [tiles, M]
    whole: Any  # [tiles, M] whether the pair needs no element rule
    block: Any  # [tiles] key block, counted over all batch elements and heads
    count: Any  # [] tiles that exist
    place: Any  # [N, P] where a pair lies among all tiles' rows; past them if dead


def _plan(row: Row, blocks: int, size: int) -> _Plan:
    n, width = row.ids.shape
    live = jnp.arange(width, dtype="int32")[None] < row.count[:, None]
    block = jnp.where(live, row.key_base[:, None] + row.ids, blocks).reshape(-1)
    order = jnp.argsort(block, stable=True).astype("int32")
    edges = jnp.searchsorted(block[order], jnp.arange(blocks + 1, dtype="int32"))
    edges = edges.astype("int32")  # pairs of block x: edges[x] <= pair < edges[x + 1]
    tiles = -(-(edges[1:] - edges[:-1]) // size)
    end = jnp.cumsum(tiles, dtype="int32")
    tile = jnp.arange(n * width // size + blocks, dtype="int32")
    of = jnp.searchsorted(end, tile, side="right").astype("int32")
    of = jnp.minimum(of, blocks - 1)
    first = edges[of] + (tile - (end - tiles)[of]) * size
    pair = first[:, None] + jnp.arange(size, dtype="int32")[None]
    real = pair < edges[of + 1][:, None]
    pair = jnp.where(real, pair, first[:, None])
    rows, entry = jnp.divmod(order[jnp.minimum(pair, n * width - 1)], width)
    mine = jnp.minimum(block[order], blocks - 1)
    rank = jnp.arange(n * width, dtype="int32") - edges[mine]
    place = jnp.where(block[order] < blocks, (end - tiles)[mine] * size + rank, 2**30)
    place = jnp.zeros(n * width, "int32").at[order].set(place, unique_indices=True)
    return _Plan(
        rows, real, entry < row.full[rows], of, end[-1], place.reshape(n, width)
    )


def _tile_size(inputs: Inputs, row: Row) -> int:
    queries = inputs.q.shape[2] // inputs.layout.heads * inputs.mask.block_q
    return min(len(row.ids), max(8, TILE // queries))


def _wide(x: Array) -> Array:
    """Rows below one another: [M, B, G, Q, c] to [B, G, M * Q, c]."""
    x = x.transpose(1, 2, 0, 3, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _narrow(x: Array, rows: int) -> Array:
    """The inverse of ``_wide``."""
    x = x.reshape(*x.shape[:2], rows, -1, x.shape[-1])
    return x.transpose(2, 0, 1, 3, 4)


class _Tiles(NamedTuple):
    """The arrays of a pass, and the plan."""

    inputs: Inputs
    row: Row
    plan: _Plan
    kv: Any  # keys, values and biases as blocks
    numbers: Any

    @classmethod
    def of(cls, inputs: Inputs) -> "_Tiles":
        row = table(inputs)
        kv = jax.tree.map(lambda x: beside(inputs.layout.kv_rows(x)), inputs[1:4])
        plan = _plan(row, len(kv[0]), _tile_size(inputs, row))
        return cls(inputs, row, plan, kv, key_segments(inputs))

    def logits(self, tile: Array, queries: Array) -> tuple[Array, Any]:
        """Logits [B, G, M * Q, K], -inf where hidden, and their slope."""
        keys, _, biases = self.kv
        n, at = self.plan.rows[tile], self.plan.block[tile]
        score = self.inputs.score
        logits = score.logits(product(queries, keys[at], "bgqc,bgkc->bgqk"))
        slope = score.slope(logits)
        logits = logits if biases is None else logits + biases[at].mT
        block = (at % self.inputs.layout.columns)[None, None]
        whole = self.plan.whole[tile][:, None]
        allowed = visible(self.inputs, taken(self.row, n), self.numbers, block, whole)
        allowed = allowed & self.plan.real[tile][:, None, None, None]
        allowed = allowed.transpose(1, 0, 2, 3)[:, None, :, None]
        m, bq = allowed.shape[2], allowed.shape[4]
        split = logits.reshape(*logits.shape[:2], m, -1, bq, logits.shape[-1])
        return jnp.where(allowed, split, -jnp.inf).reshape(logits.shape), slope

    def room(self, shape: tuple[int, ...]) -> Array:
        """Zeros for every row of every tile."""
        return jnp.zeros((self.plan.rows.size, *shape))

    def kept(self, room: Array, tile: Array, value: Array) -> Array:
        """Put a tile's rows where ``place`` finds them."""
        size = self.plan.rows.shape[1]
        value = _narrow(value, size)
        return jax.lax.dynamic_update_slice_in_dim(room, value, tile * size, axis=0)

    def sum(self, room: Array, weights: Any = None) -> Array:
        """Add up each row's pairs, weighted by [N, P, B, G, Q]."""
        place = self.plan.place

        def add(p: Array, total: Array) -> Array:
            part = room.at[place[:, p]].get(mode="fill", fill_value=0)
            return total + (
                part if weights is None else part * weights[:, p, ..., None]
            )

        start = jnp.zeros((len(place), *room.shape[1:]))
        start = alike(start, room, place, weights)
        return jax.lax.fori_loop(0, place.shape[1], add, start)


def forward(inputs: Inputs) -> Attended:
    """Attend tile by tile, then join each row's parts."""
    layout, tiles = inputs.layout, _Tiles.of(inputs)
    queries = layout.tall(layout.q_rows(inputs.q, inputs.k.shape[2]))

    def visit(tile: Array, state: Any) -> Any:
        out, top, total = state
        logits, _ = tiles.logits(tile, _wide(queries[tiles.plan.rows[tile]]))
        highest = jnp.maximum(logits.max(axis=-1, keepdims=True), FLOOR)
        weights = jnp.exp(logits - highest)
        values = tiles.kv[1][tiles.plan.block[tile]]
        update = product(weights.astype(values.dtype), values, "bgqk,bgkc->bgqc")
        # A product with ones: for a sum XLA would compute the exponentials twice.
        ones = jnp.ones((*weights.shape[:2], weights.shape[-1], 1))
        mass = product(weights, ones, "bgqk,bgkc->bgqc")
        parts = zip((out, top, total), (update, highest, mass), strict=True)
        return tuple(tiles.kept(room, tile, x) for room, x in parts)

    lead = queries.shape[1:4]
    start = tiles.room((*lead, inputs.v.shape[-1])), *(tiles.room((*lead, 1)),) * 2
    start = alike(start, inputs, tiles)
    out, top, total = jax.lax.fori_loop(0, tiles.plan.count, visit, start)
    place = tiles.plan.place
    top = top[..., 0].at[place].get(mode="fill", fill_value=FLOOR)
    highest = top.max(axis=1)
    share = jnp.exp(top - highest[:, None])
    total = tiles.sum(total, share)
    seen = total > 0
    out = tiles.sum(out, share) / jnp.where(seen, total, 1)
    lse = highest[..., None] + jnp.log(jnp.where(seen, total, 1))
    lse = jnp.where(seen, lse, -jnp.inf)
    out, lse = (layout.from_q_rows(layout.flat(x), inputs.q.shape) for x in (out, lse))
    return Attended(out, lse[..., 0].mT)


def backward(inputs: Inputs, attended: Attended, cotangent: Attended) -> tuple:
    """Visit the same tiles again; a tile adds to its block's dK and dV in place."""
    tiles, dtype, layout = _Tiles.of(inputs), inputs.q.dtype, inputs.layout
    keys, values, biases = tiles.kv
    arrays = [*map(layout.tall, backward_rows(inputs, attended, cotangent))]

    def visit(tile: Array, state: Any) -> Any:
        room, dk, dv, dbias = state
        at, n = tiles.plan.block[tile], tiles.plan.rows[tile]
        queries, dout, delta, lse = (_wide(x[n]) for x in arrays)
        logits, slope = tiles.logits(tile, queries)
        weights = jnp.exp(logits - lse)
        dlogits = weights * (product(dout, values[at], "bgqc,bgkc->bgqk") - delta)
        if biases is not None:
            dbias = dbias.at[at].add(dlogits.sum(axis=2)[..., None])
        dscores = (dlogits * slope).astype(dtype)
        dq = product(dscores, keys[at], "bgqk,bgkc->bgqc")
        dk = dk.at[at].add(product(dscores, queries, "bgqk,bgqc->bgkc"))
        weights = weights.astype(dtype)
        dv = dv.at[at].add(product(weights, dout, "bgqk,bgqc->bgkc"))
        return tiles.kept(room, tile, dq), dk, dv, dbias

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), (keys, values, biases))
    start = alike((tiles.room(arrays[0].shape[1:]), *zeros), inputs, cotangent)
    room, *dkv = jax.lax.fori_loop(0, tiles.plan.count, visit, start)
    return layout.flat(tiles.sum(room)), *jax.tree.map(beside, dkv)
