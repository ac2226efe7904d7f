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
    alike,
    backward_rows,
    key_segments,
    product,
    table,
    taken,
    visible,
)
from sparsejax.typing import Array

__all__ = ["backward", "forward"]

CHUNK = 2**20  # elements of keys fetched at once


class _Fetched:
    """Keys, values and biases by row, and which of them a row sees."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.row = inputs, table(inputs)
        self.numbers = key_segments(inputs)
        kv = jax.tree.map(inputs.layout.kv_rows, inputs[1:4])
        self.kv = jax.tree.map(lambda x: x.transpose(1, 2, 0, 3, 4), kv)
        b, g, self.blocks, width, c = self.kv[0].shape
        self.rows, places = self.row.ids.shape
        each = b * g * places * width * c
        self.chunk = max(1, min(self.rows, CHUNK // max(1, each)))

    def at(self, n: Array) -> tuple[Array, Array]:
        """Blocks of some rows among all blocks, [M, P], and which are live."""
        place = jnp.arange(self.row.ids.shape[1], dtype="int32")[None]
        live = place < self.row.count[n][:, None]
        at = self.row.key_base[n][:, None] + self.row.ids[n]
        return jnp.where(live, at, self.blocks), live

    def fetch(self, at: Array) -> Any:
        """[B, G, M, P * K, c] of keys, values and biases; 0 where a list ended."""

        def take(x: Array) -> Array:
            x = x.at[:, :, at].get(mode="fill", fill_value=0)
            return x.reshape(*x.shape[:3], -1, x.shape[-1])

        return jax.tree.map(take, self.kv)

    def logits(self, n: Array, at: Array, live: Array, queries: Array, kv: Any) -> Any:
        """Logits [M, B, G, Q, P * K], -inf where hidden, and their slope."""
        inputs, (keys, _, biases) = self.inputs, kv
        logits = inputs.score.logits(product(queries, keys, "mbgqc,bgmkc->mbgqk"))
        slope = inputs.score.slope(logits)
        if biases is not None:
            logits = logits + biases.transpose(2, 0, 1, 4, 3)
        ids = jnp.where(live, at % inputs.layout.columns, 0)
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
    queries = layout.q_rows(inputs.q, inputs.k.shape[2])

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
    lse = layout.from_q_rows(lse, (*inputs.q.shape[:3], 1))[..., 0]
    return Attended(layout.from_q_rows(out, inputs.q.shape), lse.mT)


def backward(inputs: Inputs, attended: Attended, cotangent: Attended) -> tuple:
    """Fetch the same keys again; dK and dV are added where they came from."""
    fetched, dtype = _Fetched(inputs), inputs.q.dtype
    width = inputs.mask.block_kv

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

        def add(total: Array, parts: Array) -> Array:
            split = (*parts.shape[:3], -1, width, parts.shape[-1])
            return total.at[:, :, at].add(parts.reshape(split), mode="drop")

        return jax.tree.map(add, carry, dkv), product(
            dscores, kv[0], "mbgqk,bgmkc->mbgqc"
        )

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), fetched.kv)
    zeros = alike(zeros, inputs, cotangent)
    arrays = backward_rows(inputs, attended, cotangent)
    dkv, dq = fetched.scan(visit, zeros, arrays)
    return dq, *jax.tree.map(lambda x: x.transpose(2, 0, 1, 3, 4), dkv)
