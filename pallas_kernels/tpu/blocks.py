"""What a grid step works on: its blocks, which elements of them are seen, and scores.

Queries are laid out in blocks, "o r q c": all ``o`` share one list of pairs, whose rows
or others number the blocks ``r``. Keys are "o r k c"; ``inner`` neighbouring parts of
the queries read the same part of the keys. Scores are transposed, keys on sublanes and
queries on lanes: then maxima, sums and log-denominators of queries are single rows.

Symbols: q rows of a query block, k rows of a key block, c head width.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.pairs import BITS, KIND, PARTIAL

__all__ = [
    "GRANTS",
    "NN",
    "NT",
    "TN",
    "Place",
    "Tensors",
    "Tiling",
    "locate",
    "logits",
    "product",
    "seen",
]

NN, NT, TN = [(((a,), (b,)), ((), ())) for a, b in ((1, 0), (1, 1), (0, 0))]
GRANTS = 32  # key blocks that one word of grants speaks of

Rule = Callable[[Any, Any], Any]


class Tiling(NamedTuple):
    """Static: how blocks map to positions, and what becomes of a product."""

    rows: int  # query blocks of one list of a head
    columns: int  # key blocks of one head
    heads: int  # lists of one batch element
    block_q: int  # positions of a query block, which may hold each several times
    block_kv: int  # positions of a key block, which may be padded
    kv_len: int
    scale: float
    softcap: float | None
    rules: tuple[Rule, ...]  # of the partial kinds, over positions i and j


class Tensors(NamedTuple):
    """Operands; None where there is none."""

    q: Any  # "o r q c"
    k: Any  # "o r k c"
    v: Any  # "o r k c"
    do: Any = None  # "o r q c"
    lse: Any = None  # "o r 1 q", +inf where a query sees nothing
    delta: Any = None  # "o r 1 q"
    q_segments: Any = None  # "o r 1 q"
    kv_segments: Any = None  # "o r 1 k"
    bias: Any = None  # "o r 1 k"
    grants: Any = None  # "o r w q": bit n of word w lets a query read column 32 w + n
    elements: Any = None  # "b h i j k q", int8


class Place(NamedTuple):
    """Where a grid step is: scalars."""

    word: Any
    outer: Any  # part of the keys
    inner: Any  # which of its query parts
    query: Any  # block of the query arrays given
    key: Any  # block of the key arrays given
    row: Any  # query block, counted over all lists
    column: Any  # key block, likewise

    @property
    def kind(self) -> Any:
        """EMPTY, FULL or PARTIAL + rule."""
        return (self.word & ((1 << BITS) - 1)) >> KIND


def locate(ids: Any, first: Any, words: Any, others: Any, *, by_key: bool) -> Place:
    """Read the list at a grid step.

    Args:
        ids: of the grid, (outer, inner, pair), or (outer, pair, inner) by key.
        first: how many of the list's rows are before this call's.
    """
    outer, inner, n = (ids[0], ids[2], ids[1]) if by_key else ids
    word, other = words[n], others[n]
    own = word >> BITS
    if by_key:
        return Place(word, outer, inner, other, own, other, first + own)
    return Place(word, outer, inner, own, other, first + own, other)


def product(a: Any, b: Any, axes: Any) -> Any:
    """Multiply on the matrix unit; float32 in full precision, sums in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, axes, precision=exact, preferred_element_type=jnp.float32
    )


def logits(tensors: Tensors, visible: Any, tiling: Tiling) -> tuple[Any, Any]:
    """Logits [k, q], -inf where hidden, and their slope by the scaled product."""
    s, slope = product(tensors.k[...], tensors.q[...], NT) * tiling.scale, None
    if tiling.softcap is not None:
        bent = jnp.tanh(s / tiling.softcap)
        s, slope = tiling.softcap * bent, 1 - bent * bent
    if tensors.bias is not None:
        s = s + tensors.bias[...].T
    return s if visible is None else jnp.where(visible, s, -jnp.inf), slope


def seen(
    place: Place, offset: Any, tensors: Tensors, tiling: Tiling, *, ruled: bool
) -> Any:
    """Which elements of the block are visible, [k, q]; None for all of them.

    Args:
        offset: absolute position of the first query.
        ruled: whether this is a partial block, else a full one.
    """
    shape = tensors.k.shape[0], tensors.q.shape[0]
    local, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    allowed = [] if shape[0] == tiling.block_kv else [local < tiling.block_kv]
    if ruled:
        if shape[1] > tiling.block_q:
            lane = lax.rem(lane, jnp.full(shape, tiling.block_q, jnp.int32))
        top = lax.rem(place.row, np.int32(tiling.rows)) * tiling.block_q
        column = lax.rem(place.column, np.int32(tiling.columns))
        i, j = offset + top + lane, column * tiling.block_kv + local
        if tiling.kv_len < tiling.columns * tiling.block_kv:
            allowed.append(j < tiling.kv_len)
        if tiling.rules:
            allowed.append(_obeys(tiling.rules, place.kind - PARTIAL, i, j))
        allowed += _given(column, shape, tensors)
    return functools.reduce(operator.and_, allowed) if allowed else None


def _obeys(rules: tuple[Rule, ...], which: Any, i: Any, j: Any) -> Any:
    """Whether the rule of that number lets positions i read positions j."""
    if len(rules) == 1:
        return rules[0](i, j)
    # A branch cannot return truth values: they have no layout of their own.
    branches = [lambda rule=rule: rule(i, j).astype(jnp.int32) for rule in rules]
    return lax.switch(which, branches) != 0


def _given(column: Any, shape: tuple[int, int], tensors: Tensors) -> list[Any]:
    """The rules that come as arrays."""
    allowed = []
    if tensors.elements is not None:
        allowed.append(tensors.elements[...].astype(jnp.int32) != 0)
    if tensors.q_segments is not None:
        own = jnp.broadcast_to(tensors.q_segments[...], shape)
        allowed += [own == tensors.kv_segments[...].T, own != 0]
    if tensors.grants is not None:
        which = pl.ds(lax.div(column, np.int32(GRANTS)), 1)
        words = tensors.grants[which, :]
        bit = jnp.full(words.shape, 1, jnp.int32) << lax.rem(column, np.int32(GRANTS))
        allowed.append(jnp.broadcast_to(words & bit, shape) != 0)
    return allowed
