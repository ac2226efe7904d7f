"""Attention over lists of single keys: every row fetches the keys that it lists.

Some rows at a time, as many as a few megabytes of keys allow. All heads that share a
list share what was fetched. The time follows the listed keys.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.attention.attended import Attended
from sparsejax.attention.rows import (
    FLOOR,
    Inputs,
    backward_rows,
    key_segments,
    pad,
    product,
    table,
    taken,
    visible,
)
from sparsejax.partition import alike
from sparsejax.typing import Array

__all__ = ["backward", "forward"]

CHUNK = 2**20  # elements of keys fetched at once


class _Fetched:
    """Keys, values and biases by row, and which of them a row sees."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.row = inputs, table(inputs)
        self.numbers = key_segments(inputs)
        # Where they lie: moving all keys would cost more than fetching a few.
        self.kv = jax.tree.map(self.in_place, inputs[1:4])
        self.rows, places = self.row.ids.shape
        _, b, _, width, _, g, c = self.kv[0].shape
        each = b * g * places * width * c
        self.chunk = max(1, min(self.rows, CHUNK // max(1, each)))

    def in_place(self, x: Array) -> Array:
        """[b, s, g, c] as [batches, B, columns, K, key heads, G, c]."""
        b, _, g, c = x.shape
        layout = self.inputs.layout
        x = pad(x, 1, layout.columns * layout.block_kv)
        x = x.reshape(layout.batches, b // layout.batches, layout.columns, -1, g, c)
        return x.reshape(*x.shape[:4], layout.keys, g // layout.keys, c)

    def at(self, n: Array) -> tuple[Any, Array]:
        """Where the blocks of some rows are, each [M, P], and which are live."""
        layout, place = self.inputs.layout, jnp.arange(self.row.ids.shape[1])
        live = place[None] < self.row.count[n][:, None]
        column = jnp.where(live, self.row.ids[n], layout.columns)
        batch, head = jnp.divmod(self.row.key_base[n] // layout.columns, layout.keys)
        return (batch[:, None], column, head[:, None]), live

    def fetch(self, at: Any) -> Any:
        """[B, G, M, P * K, c] of keys, values and biases; 0 where a list ended."""
        batch, column, head = at

        def take(x: Array) -> Array:
            x = x.at[batch, :, column, :, head].get(mode="fill", fill_value=0)
            x = x.transpose(2, 4, 0, 1, 3, 5)
            return x.reshape(*x.shape[:3], -1, x.shape[-1])

        return jax.tree.map(take, self.kv)

    def added(self, total: Array, parts: Array, at: Any) -> Array:
        """Add what ``fetch`` would give to where it came from."""
        batch, column, head = at
        width = self.inputs.mask.block_kv
        parts = parts.reshape(*parts.shape[:3], -1, width, parts.shape[-1])
        parts = parts.transpose(2, 3, 0, 4, 1, 5)
        return total.at[batch, :, column, :, head].add(parts, mode="drop")

    def logits(self, n: Array, at: Any, live: Array, queries: Array, kv: Any) -> Any:
        """Logits [M, B, G, Q, P * K], -inf where hidden, and their slope."""
        inputs, (keys, _, biases) = self.inputs, kv
        logits = inputs.score.logits(product(queries, keys, "mbgqc,bgmkc->mbgqk"))
        slope = inputs.score.slope(logits)
        if biases is not None:
            logits = logits + biases.transpose(2, 0, 1, 4, 3)
        ids = jnp.where(live, at[1], 0)
        place = jnp.arange(ids.shape[1], dtype="int32")[None]
        whole = place < self.row.full[n][:, None]
        allowed = visible(inputs, taken(self.row, n), self.numbers, ids, whole)
        allowed = allowed & live.repeat(inputs.mask.block_kv, axis=1)[:, None, None]
        allowed = allowed[:, :, None, None]
        split = (*logits.shape[:3], -1, *allowed.shape[-2:])
        hidden = jnp.where(allowed, logits.reshape(split), -jnp.inf)
        return hidden.reshape(logits.shape), slope

    def scan(self, visit: Any, carry: Any, arrays: Any) -> Any:
        """Run ``visit(carry, (rows, arrays of these rows))`` over all rows."""
        chunks = -(-self.rows // self.chunk)
        # Past the end the last row comes again; its second results are cut off.
        n = jnp.minimum(jnp.arange(chunks * self.chunk, dtype="int32"), self.rows - 1)
        n = n.reshape(chunks, self.chunk)
        fresh = jnp.arange(n.size, dtype="int32").reshape(n.shape) < self.rows

        def body(carry: Any, each: Any) -> Any:
            n, fresh = each
            return visit(carry, n, fresh, jax.tree.map(lambda x: x[n], arrays))

        carry, out = jax.lax.scan(body, carry, (n, fresh))
        cut = lambda x: x.reshape(-1, *x.shape[2:])[: self.rows]  # noqa: E731
        return carry, jax.tree.map(cut, out)


def forward(inputs: Inputs) -> Attended:
    """Attend a few rows at a time."""
    layout, fetched = inputs.layout, _Fetched(inputs)
    queries = layout.tall(layout.q_rows(inputs.q, inputs.k.shape[2]))

    def visit(carry: Any, n: Array, _: Array, queries: Array) -> Any:
        at, live = fetched.at(n)
        kv = fetched.fetch(at)
        logits, _ = fetched.logits(n, at, live, queries, kv)
        top = jnp.maximum(logits.max(axis=-1, keepdims=True), FLOOR)
        weights = jnp.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        seen = total > 0
        out = product(weights.astype(queries.dtype), kv[1], "mbgqk,bgmkc->mbgqc")
        lse = top + jnp.log(jnp.where(seen, total, 1))
        return carry, (out / jnp.where(seen, total, 1), jnp.where(seen, lse, -jnp.inf))

    _, (out, lse) = fetched.scan(visit, (), queries)
    out, lse = (layout.from_q_rows(layout.flat(x), inputs.q.shape) for x in (out, lse))
    return Attended(out, lse[..., 0].mT)


def backward(inputs: Inputs, attended: Attended, cotangent: Attended) -> tuple:
    """Fetch the same keys again; dK and dV are added where they came from."""
    fetched, dtype = _Fetched(inputs), inputs.q.dtype

    def visit(carry: Any, n: Array, fresh: Array, arrays: Any) -> Any:
        queries, dout, delta, lse = arrays
        at, live = fetched.at(n)
        kv = fetched.fetch(at)
        logits, slope = fetched.logits(n, at, live & fresh[:, None], queries, kv)
        weights = jnp.exp(logits - lse)
        dlogits = weights * (product(dout, kv[1], "mbgqc,bgmkc->mbgqk") - delta)
        dscores = (dlogits * slope).astype(dtype)
        dkv = (
            product(dscores, queries, "mbgqk,mbgqc->bgmkc"),
            product(weights.astype(dtype), dout, "mbgqk,mbgqc->bgmkc"),
            None
            if kv[2] is None
            else dlogits.sum(axis=3).transpose(1, 2, 0, 3)[..., None],
        )

        carry = jax.tree.map(lambda x, y: fetched.added(x, y, at), carry, dkv)
        return carry, product(dscores, kv[0], "mbgqk,bgmkc->mbgqc")

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), fetched.kv)
    zeros = alike(zeros, inputs, cotangent)
    layout = inputs.layout
    arrays = [*map(layout.tall, backward_rows(inputs, attended, cotangent))]
    dkv, dq = fetched.scan(visit, zeros, arrays)

    def as_rows(x: Array, like: Array) -> Array:
        whole = like.shape[0], layout.columns * layout.block_kv, *like.shape[2:]
        return layout.kv_rows(x.reshape(whole))

    return layout.flat(dq), *jax.tree.map(as_rows, dkv, inputs[1:4])
