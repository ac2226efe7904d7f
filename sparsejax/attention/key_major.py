"""Attention where every query has a list: queries that read a block become a tile.

Pairs of a row and a block are sorted by block and cut into tiles of rows that read the
same block, so that all products are between dense tiles. Each tile leaves the partial
softmax of its pairs, and a row joins those of its own. The time follows the pairs. A
step takes several tiles, because each operation of XLA costs some microseconds.

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
STEP, MOST = 2**18, 16  # logits of a step, and tiles


class _Plan(NamedTuple):
    """Tiles of pairs, those that exist first, to a whole number of steps."""

    rows: Any  # [tiles, M] rows of a tile; the first one again where it ends
    real: Any  # [tiles, M]
    whole: Any  # [tiles, M] whether the pair needs no element rule
    block: Any  # [tiles] key block, counted over all batch elements and heads
    steps: Any  # [] with a tile that exists
    place: Any  # [N, P] where a pair lies among all tiles' rows; past them if dead


def _plan(row: Row, blocks: int, size: int, at_once: int) -> _Plan:
    n, width = row.ids.shape
    live = jnp.arange(width, dtype="int32")[None] < row.count[:, None]
    block = jnp.where(live, row.key_base[:, None] + row.ids, blocks).reshape(-1)
    order = jnp.argsort(block, stable=True).astype("int32")
    edges = jnp.searchsorted(block[order], jnp.arange(blocks + 1, dtype="int32"))
    edges = edges.astype("int32")  # pairs of block x: edges[x] <= pair < edges[x + 1]
    tiles = -(-(edges[1:] - edges[:-1]) // size)
    end = jnp.cumsum(tiles, dtype="int32")
    most = -(-(n * width // size + blocks) // at_once) * at_once
    tile = jnp.arange(most, dtype="int32")
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
    whole, steps = entry < row.full[rows], -(-end[-1] // at_once)
    return _Plan(rows, real, whole, of, steps, place.reshape(n, width))


def _sizes(inputs: Inputs, row: Row) -> tuple[int, int]:
    """Rows of a tile, and tiles of a step."""
    layout, mask = inputs.layout, inputs.mask
    queries = inputs.q.shape[2] // layout.heads * mask.block_q
    size = min(len(row.ids), max(8, TILE // queries))
    logits = inputs.q.shape[0] // layout.batches * size * queries * mask.block_kv
    return size, max(1, min(MOST, STEP // logits))


def _wide(x: Array) -> Array:
    """Rows below one another: [N, M, B, G, Q, c] to [N, B, G, M * Q, c]."""
    x = x.transpose(0, 2, 3, 1, 4, 5)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _narrow(x: Array, rows: int) -> Array:
    """The inverse of ``_wide``, of all tiles: [N * M, B, G, Q, c]."""
    x = x.reshape(*x.shape[:3], rows, -1, x.shape[-1])
    x = x.transpose(0, 3, 1, 2, 4, 5)
    return x.reshape(-1, *x.shape[2:])


class _Tiles(NamedTuple):
    """The arrays of a pass, and the plan."""

    inputs: Inputs
    row: Row
    plan: _Plan
    at_once: int  # tiles of a step
    kv: Any  # keys, values and biases as blocks
    numbers: Any

    @classmethod
    def of(cls, inputs: Inputs) -> "_Tiles":
        row = table(inputs)
        kv = jax.tree.map(lambda x: beside(inputs.layout.kv_rows(x)), inputs[1:4])
        size, at_once = _sizes(inputs, row)
        plan = _plan(row, len(kv[0]), size, at_once)
        return cls(inputs, row, plan, at_once, kv, key_segments(inputs))

    def of_step(self, step: Array) -> Array:
        """The tiles of a step, [N]."""
        return step * self.at_once + jnp.arange(self.at_once, dtype="int32")

    def logits(self, tile: Array, queries: Array) -> tuple[Array, Any]:
        """Logits of one tile [B, G, M * Q, K], -inf where hidden, and their slope."""
        keys, _, biases = self.kv
        n, at = self.plan.rows[tile], self.plan.block[tile]
        score = self.inputs.score
        logits = score.logits(product(queries, keys[at], "bgqc,bgkc->bgqk"))
        slope = jnp.broadcast_to(score.slope(logits), logits.shape)
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

    def kept(self, room: Array, step: Array, value: Array) -> Array:
        """Put the rows of a step's tiles where ``place`` finds them."""
        value = _narrow(value, self.plan.rows.shape[1])
        start = step * len(value)
        return jax.lax.dynamic_update_slice_in_dim(room, value, start, axis=0)

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
    """Attend some tiles at a time, then join each row's parts."""
    layout, tiles = inputs.layout, _Tiles.of(inputs)
    queries = layout.tall(layout.q_rows(inputs.q, inputs.k.shape[2]))

    def visit(step: Array, state: Any) -> Any:
        out, top, total = state
        tile = tiles.of_step(step)
        rows = _wide(queries[tiles.plan.rows[tile]])
        logits, _ = jax.vmap(tiles.logits)(tile, rows)
        highest = jnp.maximum(logits.max(axis=-1, keepdims=True), FLOOR)
        weights = jnp.exp(logits - highest)
        values = tiles.kv[1][tiles.plan.block[tile]]
        update = product(weights.astype(values.dtype), values, "nbgqk,nbgkc->nbgqc")
        # A product with ones: for a sum XLA would compute the exponentials twice.
        ones = jnp.ones((*weights.shape[:3], weights.shape[-1], 1))
        mass = product(weights, ones, "nbgqk,nbgkc->nbgqc")
        parts = zip((out, top, total), (update, highest, mass), strict=True)
        return tuple(tiles.kept(room, step, x) for room, x in parts)

    lead = queries.shape[1:4]
    start = tiles.room((*lead, inputs.v.shape[-1])), *(tiles.room((*lead, 1)),) * 2
    start = alike(start, inputs, tiles)
    out, top, total = jax.lax.fori_loop(0, tiles.plan.steps, visit, start)
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
    """Visit the same tiles again; each adds to its block's dK and dV in place."""
    tiles, dtype, layout = _Tiles.of(inputs), inputs.q.dtype, inputs.layout
    keys, values, biases = tiles.kv
    arrays = [*map(layout.tall, backward_rows(inputs, attended, cotangent))]

    def visit(step: Array, state: Any) -> Any:
        room, *sums = state
        tile = tiles.of_step(step)
        at, n = tiles.plan.block[tile], tiles.plan.rows[tile]
        queries, dout, delta, lse = (_wide(x[n]) for x in arrays)
        logits, slope = jax.vmap(tiles.logits)(tile, queries)
        weights = jnp.exp(logits - lse)
        dlogits = weights * (product(dout, values[at], "nbgqc,nbgkc->nbgqk") - delta)
        dscores = (dlogits * slope).astype(dtype)
        dq = product(dscores, keys[at], "nbgqk,nbgkc->nbgqc")
        parts = (
            product(queries, dscores, "nbgqc,nbgqk->nbgck"),
            product(dout, weights.astype(dtype), "nbgqc,nbgqk->nbgck"),
            None if biases is None else dlogits.sum(axis=3)[..., None, :],
        )

        def add(total: Array, part: Array) -> Array:
            for one in range(len(at)):  # several tiles may be of one block
                total = total.at[at[one]].add(part[one])
            return total

        return tiles.kept(room, step, dq), *jax.tree.map(add, tuple(sums), parts)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.mT.shape), (keys, values, biases))
    start = alike((tiles.room(arrays[0].shape[1:]), *zeros), inputs, cotangent)
    room, *dkv = jax.lax.fori_loop(0, tiles.plan.steps, visit, start)
    return layout.flat(tiles.sum(room)), *jax.tree.map(lambda x: beside(x.mT), dkv)
