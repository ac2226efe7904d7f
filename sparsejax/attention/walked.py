"""Attention over lists of blocks: every row walks its own, some blocks at a step.

A row is (batch or 1, head or 1, query block); it takes the blocks of ``ids[:full]``
without and those up to ``count`` with the element rule, under an online softmax. A step
takes several blocks, because each operation of XLA costs some microseconds however
small it is; places after the end of a list repeat its last block and are hidden. The
backward pass walks the same lists and adds dK and dV in place.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention.attended import Attended
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.rows import (
    FLOOR,
    Inputs,
    Row,
    backward_rows,
    beside,
    key_segments,
    product,
    table,
)
from sparsejax.partition import alike
from sparsejax.typing import Array

__all__ = ["backward", "forward", "strides"]

TILE = 2**19  # logits of a step: as many as stay near the core
MOST = 8  # blocks of a step
OVERHEAD = 0.7  # of a step, in blocks of 128 x 128 with four heads
RULED = 1.1  # what a block with a rule costs, in blocks without


def strides(mask: BlockMask, shape: tuple[int, ...]) -> tuple[int, int]:
    """Choose how many blocks a step takes: of full ones, and of those left over.

    Few steps are good, and so are few places for nothing. Where the second number
    holds a whole list, there is but one step, and no loop.

    Args:
        mask: whose lists are walked; unless they are numpy's, the choice is a guess.
        shape: of the queries, "b t h c".
    """
    batches, heads = mask.ids.shape[:2]
    rows = shape[0] // batches * (shape[2] // heads) * mask.block_q
    widest = min(MOST, mask.ids.shape[-1], TILE // (rows * mask.block_kv))
    choices = range(1, max(1, widest) + 1)
    if not isinstance(mask.count, np.ndarray):
        return min(4, choices[-1]), min(2, choices[-1])
    pairs = np.stack([mask.count, np.asarray(mask.full)]).reshape(2, -1)
    (count, full), alike_rows = np.unique(pairs, axis=1, return_counts=True)
    overhead = OVERHEAD * 2**16 / (rows * mask.block_kv)

    def cost(pair: tuple[int, int]) -> float:
        wide, narrow = pair
        if narrow >= mask.ids.shape[-1]:
            return RULED * narrow * float(alike_rows.sum())  # two rows hide the rest
        steps = full // wide
        rest = -(-(count - steps * wide) // narrow)
        ruled = RULED * narrow + overhead
        return float(alike_rows @ (steps * (wide + overhead) + rest * ruled))

    return min(itertools.product(choices, choices), key=cost)


class _Steps:
    """The blocks that a row takes at a step, and what it sees of them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.numbers = inputs, key_segments(inputs)
        self.single = inputs.mask.ids.shape[-1] <= inputs.strides[1]
        # On the queries it is one pass over few numbers, but in less it would round.
        exact, score = inputs.q.dtype == "float32", inputs.score
        self.scale = score.scale if exact else 1.0
        self.score = score._replace(scale=1.0) if exact else score
        self.kv = jax.tree.map(inputs.layout.kv_rows, inputs[1:4])

    def scaled(self, queries: Array) -> Array:
        """Queries of a row as products take them."""
        return self.inputs.layout.tall(queries) * self.scale

    def walk(self, row: Row, step: Any, state: Any) -> Any:
        """Take all steps of a row: ``step(blocks, what they let be seen, state)``."""
        wide, narrow = self.inputs.strides
        steps = 0 if self.single else row.full // wide
        done = steps * wide

        def plain(n: Array, state: Any) -> Any:
            ids = jax.lax.dynamic_slice_in_dim(row.ids, n * wide, wide)
            return step(ids, None, state)

        def ruled(n: Array | int, state: Any) -> Any:
            place = done + n * narrow + jnp.arange(narrow, dtype="int32")
            # After the end the last block comes again, hidden.
            ids = row.ids[jnp.minimum(place, row.count - 1)]
            return step(ids, self.visible(row, place, ids), state)

        if self.single:
            return ruled(0, state)
        state = jax.lax.fori_loop(0, steps, plain, state)
        return jax.lax.fori_loop(0, -(-(row.count - done) // narrow), ruled, state)

    def tiles(self, row: Row, ids: Array) -> Any:
        """Keys, values and biases of some blocks, [B, G, K, c]."""

        def of(x: Array) -> Array:
            x = x.at[row.key_base + ids].get(mode="clip").transpose(1, 3, 0, 2, 4)
            return x.reshape(*x.shape[:2], -1, x.shape[-1])

        return jax.tree.map(of, self.kv)

    def added(self, row: Row, ids: Array, total: Any, tiles: Any) -> Any:
        """Add the tiles of some blocks, [B, G, c, K], where they came from."""

        def add(total: Array, tile: Array) -> Array:
            parts = jnp.split(tile, len(ids), axis=3)
            for block, part in zip(ids, parts, strict=True):
                total = total.at[row.key_base + block].add(part)
            return total

        return jax.tree.map(add, total, tiles)

    def logits(self, allowed: Any, queries: Array, kv: Any) -> tuple[Array, Any]:
        """Logits [B, G, Q, K], -inf where hidden, and their slope by the products."""
        score, (keys, _, biases) = self.score, kv
        logits = score.logits(product(queries, keys, "bgqc,bgkc->bgqk"))
        slope = score.slope(logits)
        logits = logits if biases is None else logits + biases.mT
        if allowed is None:
            return logits, slope
        split = (*logits.shape[:2], -1, *allowed.shape[-2:])
        hidden = jnp.where(allowed, logits.reshape(split), -jnp.inf)
        return hidden.reshape(logits.shape), slope

    def visible(self, row: Row, place: Array, ids: Array) -> Array:
        """The element rule of a step's blocks, [B, 1, 1, block_q, K]."""
        mask = self.inputs.mask
        bq, bk = mask.block_q, mask.block_kv
        live, whole = place < row.count, place < row.full

        def cut(x: Array) -> Array:
            x = x.reshape(*x.shape[:-1], -1, bk)[..., ids, :]
            return x.reshape(*x.shape[:-2], -1)

        i = row.top + jnp.arange(bq, dtype="int32")[:, None]
        lane = jnp.arange(bk, dtype="int32")
        j = (ids[:, None] * bk + lane[None]).reshape(1, -1)
        allowed = jnp.broadcast_to(j < mask.kv_len, (bq, j.shape[1]))
        if row.choice is not None:
            branches = [functools.partial(p, i, j) for p in mask.patterns]
            allowed = allowed & jax.lax.switch(row.choice, branches)
        elif mask.patterns:
            allowed = allowed & mask.patterns[0](i, j)
        if row.elements is not None:
            allowed = allowed & cut(row.elements)
        if row.grants is not None:
            allowed = allowed & row.grants[:, ids].repeat(bk, axis=1)
        allowed = allowed[None]
        if row.segments is not None and self.numbers is not None:
            keys, own = cut(self.numbers[row.batch]), row.segments[:, :, None]
            allowed = allowed & (own == keys[:, None, :]) & (own != 0)
        whole, live = (x.repeat(bk)[None, None] for x in (whole, live))
        allowed = ((allowed | whole) & live)[:, None, None]
        # Without a barrier XLA evaluates the rule for each head, and several times.
        return jax.lax.optimization_barrier(allowed)


def forward(inputs: Inputs) -> Attended:
    """Attend row by row."""
    layout, shape = inputs.layout, inputs.q.shape
    q_rows = layout.q_rows(inputs.q, inputs.k.shape[2])
    steps = _Steps(inputs)

    def visit(carry: Any, each: Any) -> Any:
        row, queries = each[0], steps.scaled(each[1])

        def step(ids: Array, allowed: Any, state: Any) -> Any:
            top, total, out = state
            kv = steps.tiles(row, ids)
            logits, _ = steps.logits(allowed, queries, kv)
            higher = jnp.maximum(top, logits.max(axis=-1))
            weights = jnp.exp(logits - higher[..., None])
            kept = jnp.exp(top - higher)
            update = product(weights.astype(kv[1].dtype), kv[1], "bgqk,bgkc->bgqc")
            # A product with ones: for a sum XLA would compute the exponentials twice.
            ones = jnp.ones((*weights.shape[:2], weights.shape[-1]))
            total = total * kept + product(weights, ones, "bgqk,bgk->bgq")
            return higher, total, out * kept[..., None] + update

        lead = queries.shape[:-1]
        start = (
            jnp.full(lead, FLOOR),
            jnp.zeros(lead),
            jnp.zeros((*lead, inputs.v.shape[3])),
        )
        top, total, out = steps.walk(row, step, alike(start, inputs, row))
        seen = total > 0
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
        out = out / jnp.where(seen, total, 1)[..., None]
        return carry, (layout.flat(out), layout.flat(lse[..., None]))

    pace = 2 if steps.single else 1  # two rows at a time keep more cores busy
    _, (out, lse) = jax.lax.scan(visit, (), (table(inputs), q_rows), unroll=pace)
    out, lse = (layout.from_q_rows(x, shape) for x in (out, lse))
    return Attended(out, lse[..., 0].mT)


def backward(inputs: Inputs, attended: Attended, cotangent: Attended) -> tuple:
    """Walk once more; rows of dQ, and dK, dV and the biases' gradient."""
    arrays = backward_rows(inputs, attended, cotangent)
    layout, steps = inputs.layout, _Steps(inputs)
    dtype = inputs.q.dtype

    def visit(carry: Any, each: Any) -> Any:
        row, queries = each[0], steps.scaled(each[1])
        dout, delta, lse = map(layout.tall, each[2:])

        def step(ids: Array, allowed: Any, state: Any) -> Any:
            dq, total = state
            kv = keys, values, biases = steps.tiles(row, ids)
            logits, slope = steps.logits(allowed, queries, kv)
            weights = jnp.exp(logits - lse)
            dlogits = weights * (product(dout, values, "bgqc,bgkc->bgqk") - delta)
            dscores = (dlogits * slope).astype(dtype)
            # The wide factor goes right: left, and turned, it costs up to half more.
            dkv = (
                product(queries, dscores, "bgqc,bgqk->bgck"),
                product(dout, weights.astype(dtype), "bgqc,bgqk->bgck"),
                None if biases is None else dlogits.sum(axis=2)[:, :, None],
            )
            dq = dq + product(dscores, keys, "bgqk,bgkc->bgqc")
            return dq, steps.added(row, ids, total, dkv)

        start = alike(jnp.zeros(queries.shape), inputs, cotangent)
        dq, carry = steps.walk(row, step, (start, carry))
        return carry, layout.flat(dq * steps.scale)

    zeros = jax.tree.map(lambda x: beside(jnp.zeros(x.shape)).mT, steps.kv)
    zeros = alike(zeros, inputs, cotangent)
    dkv, dq = jax.lax.scan(visit, zeros, (table(inputs), *arrays))
    return dq, *jax.tree.map(lambda x: beside(x.mT), dkv)
