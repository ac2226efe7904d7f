"""Attention's arrays as rows, the form in which the XLA paths compute.

Heads and batch elements that share a mask row are processed together: one row is
(batch or 1, head or 1, query block), and a key block is one integer into all key
blocks. A path is a module with ``forward(inputs) -> Attended``, values in float32, and
``backward(inputs, attended, cotangent) -> gradients`` of queries, keys, values, bias.

Symbols: N rows, B and G the batch elements and key heads of a row, Q query positions of
a row times the query heads of a group, K keys of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.typing import Array

__all__ = ["FLOOR", "Inputs", "Layout", "Row", "Score", "pad", "product"]

FLOOR = -1e30  # where a running maximum starts: finite, so that exp(-inf - m) is 0


class Score(NamedTuple):
    """From a product of query and key to a logit."""

    scale: float
    softcap: float | None

    def logits(self, product: Array) -> Array:
        """Scale, and bound smoothly."""
        scaled = self.scale * product
        if self.softcap is None:
            return scaled
        return self.softcap * jnp.tanh(scaled / self.softcap)

    def slope(self, logits: Array) -> Array | float:
        """Derivative of the logits by the product."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - jnp.square(logits / self.softcap))


class Inputs(NamedTuple):
    """What a path is given; the bias is laid out like a key of width 1."""

    q: Any  # [b, t, h, c]
    k: Any  # [b, s, g, c]
    v: Any
    bias: Any  # [b, s, g, 1], or None
    mask: BlockMask
    segments: Segments | None
    score: Score
    strides: tuple[int, int]  # blocks of a step: without a rule, and with one

    @property
    def layout(self) -> "Layout":
        """How these arrays become rows."""
        return Layout.of(self.mask, self.k.shape[2])


class Layout(NamedTuple):
    """How "b t h c" becomes rows: ``batches * heads * rows`` rows share nothing."""

    batches: int  # batch elements with lists of their own, or 1
    heads: int  # heads with lists of their own, or 1
    keys: int  # key heads that need telling apart by the row, or 1
    rows: int
    columns: int
    block_q: int
    block_kv: int

    @classmethod
    def of(cls, mask: BlockMask, key_heads: int) -> "Layout":
        """Layout that the mask's lists ask for."""
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
        """[b, t, h, c] to [N, B, q, G, r, c]; shared lists move nothing."""
        b, _, h, c = x.shape
        x = pad(x, 1, self.rows * self.block_q)
        group = groups // self.keys
        x = x.reshape(
            *(self.batches, b // self.batches, self.rows, self.block_q, self.heads),
            *(group, h // self.heads // group, c),
        )
        x = x.transpose(0, 4, 2, 1, 3, 5, 6, 7)
        return x.reshape(-1, *x.shape[3:])

    def from_q_rows(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[N, B, q, G, r, c] to [b, t, h, c]."""
        b, t, h, _ = shape
        x = x.reshape(self.batches, self.heads, self.rows, *x.shape[1:])
        x = x.transpose(0, 3, 2, 4, 1, 5, 6, 7)
        return x.reshape(b, self.rows * self.block_q, h, -1)[:, :t]

    def tall(self, x: Array) -> Array:
        """[..., q, G, r, c] to [..., G, Q, c], as products take it."""
        x = jnp.moveaxis(x, -4, -2)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    def flat(self, x: Array) -> Array:
        """[..., G, Q, c] to [..., q, G, r, c]."""
        x = x.reshape(*x.shape[:-2], -1, self.block_q, x.shape[-1])
        return jnp.moveaxis(x, -2, -4)

    def kv_rows(self, x: Array) -> Array:
        """[b, s, g, c] to [blocks, B, K, G, c]; shared lists move nothing."""
        b, _, g, c = x.shape
        x = pad(x, 1, self.columns * self.block_kv)
        x = x.reshape(
            *(self.batches, b // self.batches, self.columns, self.block_kv, self.keys),
            *(g // self.keys, c),
        )
        x = x.transpose(0, 4, 2, 1, 3, 5, 6)
        return x.reshape(-1, *x.shape[3:])

    def from_kv_rows(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[blocks, B, K, G, c] to [b, s, g, c]."""
        b, s, g, c = shape
        x = x.reshape(self.batches, self.keys, self.columns, *x.shape[1:])
        x = x.transpose(0, 3, 2, 4, 1, 5, 6)
        return x.reshape(b, self.columns * self.block_kv, g, c)[:, :s]


class Row(NamedTuple):
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


def table(inputs: Inputs) -> Row:
    """What every row knows."""
    mask, layout, segments = inputs.mask, inputs.layout, inputs.segments
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

    def of_rows(entries: Any) -> Any:
        if entries is None:
            return None
        b, h = entries.shape[:2]
        tiles = jnp.asarray(entries).reshape(b, h, layout.rows, layout.block_q, -1)
        return tiles[batch % b, head % h, place % layout.rows]

    if segments is not None:
        padded = pad(segments.q, 1, layout.rows * layout.block_q)
        padded = padded.reshape(layout.batches, -1, layout.rows, layout.block_q)
        numbers = padded[batch, :, place % layout.rows]
    return Row(
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


def key_segments(inputs: Inputs) -> Array | None:
    """Segments of the keys, [batches, B, keys]."""
    layout, segments = inputs.layout, inputs.segments
    if segments is None:
        return None
    padded = pad(segments.kv, 1, layout.columns * layout.block_kv)
    return padded.reshape(layout.batches, -1, padded.shape[1])


def backward_rows(inputs: Inputs, attended: Attended, cotangent: Attended) -> list:
    """Queries, output gradients, their shift and the log-denominators, as rows."""
    dout = cotangent.values.astype("float32")
    # A row that saw nothing: with +inf, exp(logit - lse) is 0 and not NaN.
    blind = jnp.isinf(attended.lse)
    lse = jnp.where(blind, jnp.inf, attended.lse).mT
    edge = inputs.layout.rows * inputs.layout.block_q - lse.shape[1]
    lse = jnp.pad(lse, [(0, 0), (0, edge), (0, 0)], constant_values=jnp.inf)
    dlse = jnp.where(blind, 0, cotangent.lse).mT
    delta = (dout * attended.values).sum(axis=-1) - dlse
    q, groups = inputs.q, inputs.k.shape[2]
    arrays = q, dout.astype(q.dtype), delta[..., None], lse[..., None]
    return [inputs.layout.q_rows(x, groups) for x in arrays]


def gradients(inputs: Inputs, dq: Array, dk: Array, dv: Array, dbias: Any) -> tuple:
    """From rows to gradients like the inputs."""
    layout, (q, k, v, bias) = inputs.layout, inputs[:4]
    return (
        layout.from_q_rows(dq, q.shape).astype(q.dtype),
        layout.from_kv_rows(dk, k.shape).astype(k.dtype),
        layout.from_kv_rows(dv, v.shape).astype(v.dtype),
        None if bias is None else layout.from_kv_rows(dbias, bias.shape),
    )


def visible(inputs: Inputs, row: Row, numbers: Any, ids: Array, whole: Array) -> Array:
    """What some rows see of some of their blocks, [M, B, block_q, P * K].

    Args:
        inputs: of the whole computation.
        row: these rows, without their tables ``elements`` and ``grants``.
        numbers: segments of the keys, or None.
        ids: blocks, [M, P] or [1, P] where all rows have the same.
        whole: which of them need no rule, [M, P].
    """
    mask = inputs.mask
    bq, bk = mask.block_q, mask.block_kv
    step, lane = (jnp.arange(n, dtype="int32") for n in (bq, bk))
    i = row.top[:, None, None] + step[None, :, None]
    j = (ids[:, :, None] * bk + lane[None, None]).reshape(len(ids), 1, -1)
    allowed = j < mask.kv_len
    for index, pattern in enumerate(mask.patterns):
        mine = True if row.choice is None else row.choice[:, None, None] == index
        allowed = allowed & (pattern(i, j) | ~jnp.asarray(mine))
    if row.elements is not None:
        allowed = allowed & row.elements(step[None, :, None], j)
    if row.grants is not None:
        block = ids[:, None, :].repeat(bk, axis=2)
        allowed = allowed & row.grants(step[None, :, None], block)
    allowed = allowed[:, None]
    if row.segments is not None:
        own = row.segments[..., None]
        lead = row.batch[:, None, None], jnp.arange(numbers.shape[1])[None, :, None]
        allowed = allowed & (own == numbers[(*lead, j)][:, :, None]) & (own != 0)
    allowed = allowed | whole.repeat(bk, axis=1)[:, None, None]
    batch = inputs.q.shape[0] // inputs.layout.batches
    return jnp.broadcast_to(allowed, (len(row.top), batch, bq, j.shape[-1]))


def taken(table: Row, n: Array) -> Row:
    """Some rows of the table; their large tables become functions of an index."""

    def at(entries: Any) -> Any:
        if entries is None:
            return None
        return lambda step, place: entries[n[:, None, None], step, place]

    small = table._replace(elements=None, grants=None)
    small = jax.tree.map(lambda x: x[n], small)
    return small._replace(elements=at(table.elements), grants=at(table.grants))


def product(a: Array, b: Array, spec: str) -> Array:
    """Multiply with sums in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def beside(blocks: Array) -> Array:
    """[blocks, B, K, G, c] to [blocks, B, G, K, c], or back."""
    return blocks.swapaxes(2, 3)


def pad(x: Array, axis: int, length: int) -> Array:
    """Lengthen an axis with zeros."""
    if x.shape[axis] == length:
        return x
    edges = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, edges)
