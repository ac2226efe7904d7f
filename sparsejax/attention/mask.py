"""``BlockMask``: which key blocks each query block reads, and what holds inside them.

Per (batch or 1, head or 1, query block) the mask lists its live key blocks, those
without any rule inside first: walking ``ids[..., :full]`` and then
``ids[..., full:count]`` is all a kernel does. Inside the others an element is visible
if ``pattern(i, j)`` holds at absolute positions (``q_offset`` is added to the query's),
``elements`` holds, ``grants`` gives the block to the query, and ``j < kv_len``. Sizes
and pattern are static, tables may be traced.

Blocks may be as small as one query (every query its own list) and one key (chosen
tokens); ``coarsened`` turns such lists into the larger blocks that kernels take.
"""

import operator
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention import lists as ls
from sparsejax.attention.patterns import Pattern
from sparsejax.typing import Array, Bool, Int, PyTree

__all__ = ["BlockMask"]

Table = Int[Array, "b h i j"] | Int[np.ndarray, "b h i j"]
Counts = Int[Array, "b h i"] | Int[np.ndarray, "b h i"]
Scalar = Int[Array, ""] | Int[np.ndarray, ""] | np.int32
Choice = Int[Array, " h"] | Int[np.ndarray, " h"] | None
Elements = Bool[Array, "_ _ t s"] | Bool[np.ndarray, "_ _ t s"] | None
Grants = Bool[Array, "_ _ t _"] | Bool[np.ndarray, "_ _ t _"] | None
Dense = Bool[Array, "*b t s"] | Bool[np.ndarray, "*b t s"]

_STATIC = ("patterns", "block_q", "block_kv", "q_len", "kv_len")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BlockMask:
    """Live key blocks of every query block; build one with a ``from_`` constructor.

    >>> from sparsejax.attention import sliding_window
    >>> mask = BlockMask.from_pattern(
    ...     sliding_window(8), q_len=32, kv_len=32, block_q=8, block_kv=8)
    >>> mask
    BlockMask(32 x 32 in 8 x 8 blocks, density 0.4375)
    >>> print(mask.to_text())
    +...
    ++..
    .++.
    ..++
    """

    ids: Table  # the live key blocks, full ones first; past ``count`` never read
    count: Counts  # live blocks
    full: Counts  # leading blocks that need no element rule
    q_offset: Scalar  # absolute position of the first query
    choice: Choice = None  # which of several patterns a head follows
    elements: Elements = None  # visibility of single elements, padded to whole blocks
    grants: Grants = (
        None  # blocks that a query may read; queries padded to whole blocks
    )
    patterns: tuple[Pattern, ...]  # () lets live blocks be visible throughout
    block_q: int
    block_kv: int
    q_len: int
    kv_len: int

    @classmethod
    def from_pattern(
        cls,
        pattern: Pattern | tuple[Pattern, ...],
        *,
        q_len: int,
        kv_len: int,
        block_q: int,
        block_kv: int,
        q_offset: int | Int[Array, ""] = 0,
    ) -> "BlockMask":
        """Build the mask of a pattern, or of a tuple with one pattern for each head.

        A static offset gives exact numpy tables; a traced one, as cached decoding has,
        gives tables wide enough for any below twice the number of keys.

        Raises:
            ValueError: if a length or block is not positive, or the tuple is empty.
        """
        each = pattern if isinstance(pattern, tuple) else (pattern,)
        if not each:
            raise ValueError("pattern=(): give at least one pattern")
        grid = _grid(q_len, kv_len, block_q, block_kv)
        distinct = tuple(dict.fromkeys(each))
        if isinstance(q_offset, int | np.integer):
            built = [ls.of_pattern(p, grid, int(q_offset)) for p in distinct]
            table = ls.stack_lists(built, np.stack)
        else:
            row = jnp.arange(grid.rows, dtype="int32")[:, None]
            column = jnp.arange(grid.columns, dtype="int32")[None]
            kinds = [grid.kinds(p, row, column, q_offset) for p in distinct]
            table = ls.ordered(jnp.stack(kinds))
            width = max(ls.most(p, grid) for p in distinct)
            table = table._replace(ids=table.ids[..., :width])
        choice = np.asarray([distinct.index(p) for p in each], "int32")
        table = ls.Lists(*[x[choice][None] for x in table])
        return cls(
            **table._asdict(),
            q_offset=_offset(q_offset),
            choice=choice if len(each) > 1 else None,
            patterns=distinct,
            **grid._asdict(),
        )

    @classmethod
    def from_blocks(
        cls,
        ids: Table,
        count: Counts,
        *,
        q_len: int,
        kv_len: int,
        block_q: int,
        block_kv: int,
        pattern: Pattern | None = None,
        q_offset: int | Int[Array, ""] = 0,
    ) -> "BlockMask":
        """Build a mask from chosen blocks, which may be traced.

        Blocks in which ``pattern`` allows nothing are dropped, the others are put in
        order; without a pattern they are visible throughout.

        Raises:
            ValueError: if concrete ids lie outside the keys or repeat within a row, if
                a concrete count exceeds the table, or if the shapes do not agree.
        """
        grid = _grid(q_len, kv_len, block_q, block_kv)
        ls.check_blocks(ids, count, grid)
        return cls(
            **ls.of_blocks(ids, count, grid, pattern, q_offset)._asdict(),
            q_offset=_offset(q_offset),
            patterns=() if pattern is None else (pattern,),
            **grid._asdict(),
        )

    @classmethod
    def from_dense(cls, mask: Dense, *, block_q: int, block_kv: int) -> "BlockMask":
        """Build the mask of a boolean array "t s", "h t s" or "b h t s".

        Raises:
            ValueError: if the array has another rank.
        """
        if mask.ndim not in (2, 3, 4):
            raise ValueError(
                f"mask of shape {mask.shape}: needs axes 't s', 'h t s' or 'b h t s'"
            )
        xp = np if isinstance(mask, np.ndarray) else jnp
        grid = _grid(mask.shape[-2], mask.shape[-1], block_q, block_kv)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        t, s = grid.rows * block_q, grid.columns * block_kv
        edges = [(0, 0), (0, 0), (0, t - grid.q_len), (0, s - grid.kv_len)]
        blocks = (*mask.shape[:2], grid.rows, block_q, grid.columns, block_kv)
        padded = xp.pad(mask, edges)
        some = padded.reshape(blocks).any(axis=(3, 5))
        past_the_end = np.arange(t)[:, None] >= np.full(s, grid.q_len)[None]
        every = (padded | past_the_end[None, None]).reshape(blocks).all(axis=(3, 5))
        table = ls.ordered(ls.as_kinds(ls.Cover(some, every)))
        return cls(
            **table._asdict(),
            q_offset=np.int32(0),
            elements=padded,
            patterns=(),
            **grid._asdict(),
        )

    def replace(self, **changes: Any) -> "BlockMask":
        """Give the mask with some fields changed."""
        return BlockMask(
            **{f.name: getattr(self, f.name) for f in fields(self)} | changes
        )

    def axes(self) -> PyTree:
        """Axis letters of every table, in a tree like the mask; ``1`` where shared."""
        letters = {
            "ids": "b h i j",
            "count": "b h i",
            "full": "b h i",
            "q_offset": "",
            "choice": "h",
            "elements": "b h t s",
            "grants": "b h t j",
        }

        def of(path: Any, table: Any) -> str:
            pairs = zip(letters[path[0].name].split(), table.shape, strict=True)
            return " ".join(
                "1" if letter in "bh" and size == 1 else letter
                for letter, size in pairs
            )

        return jax.tree_util.tree_map_with_path(of, self)

    @property
    def grid(self) -> ls.Grid:
        """The static sizes."""
        return ls.Grid(self.q_len, self.kv_len, self.block_q, self.block_kv)

    @property
    def pattern(self) -> Pattern | None:
        """The rule that all heads follow, if there is one.

        Raises:
            ValueError: if heads follow several.
        """
        if len(self.patterns) > 1:
            raise ValueError(
                f"heads follow {len(self.patterns)} patterns; read patterns and choice"
            )
        return self.patterns[0] if self.patterns else None

    @property
    def lists(self) -> ls.Lists:
        """The three tables."""
        return ls.Lists(self.ids, self.count, self.full)

    def density(self) -> float:
        """Live blocks over all blocks; needs concrete tables."""
        return float(np.sum(self.count)) / (self.count.size * self.grid.columns)

    def kinds(self) -> Int[Array, "b h i j"]:
        """Kind of every block: 0 empty, 1 partial, 2 full."""
        return ls.kind_map(self.lists, self.grid.columns)

    def transpose(self, *, capacity: int | None = None) -> ls.Lists:
        """List the live query blocks of every key block, for the backward pass.

        Args:
            capacity: width of the lists; by default the longest list if the tables are
                concrete, else the number of query blocks, which always suffices.

        Raises:
            ValueError: if concrete tables do not fit ``capacity``.
        """
        longest = None
        if not ls.is_traced(self.ids):
            live = np.arange(self.ids.shape[-1]) < np.asarray(self.count)[..., None]
            flat = np.asarray(self.ids).reshape(-1, *self.ids.shape[2:])
            heads = zip(flat, live.reshape(flat.shape), strict=True)
            longest = max(int(np.bincount(x[m]).max(initial=1)) for x, m in heads)
        capacity = capacity or longest or self.grid.rows
        if longest is not None and capacity < longest:
            raise ValueError(f"capacity={capacity}: a key block is read by {longest}")

        def one(lists: ls.Lists) -> ls.Lists:
            return ls.transposed(lists, columns=self.grid.columns, capacity=capacity)

        return jax.vmap(jax.vmap(one))(ls.Lists(*map(jnp.asarray, self.lists)))

    def coarsened(
        self,
        block_q: int,
        *,
        block_kv: int | None = None,
        capacity: int | None = None,
    ) -> "BlockMask":
        """Join the lists of neighbouring rows; the same elements stay visible.

        A coarse row lists the union of its rows' blocks, and ``grants`` says which of
        its queries may read which. Larger key blocks are told apart by ``elements``
        instead, which take a byte for every query and key.

        Args:
            block_q: queries of a coarse row, a multiple of the mask's.
            block_kv: keys of a coarse block, a multiple of the mask's, or the same.
            capacity: width of the lists; by default what always suffices. Where it
                does not, traced lists lose their last blocks.

        Raises:
            ValueError: if blocks are no multiples, or concrete lists do not fit.
        """
        block_kv = self.block_kv if block_kv is None else block_kv
        grid = _grid(self.q_len, self.kv_len, block_q, block_kv)
        rows, columns = block_q // self.block_q, block_kv // self.block_kv
        if block_q % self.block_q or block_kv % self.block_kv:
            raise ValueError(
                f"blocks of {block_q} x {block_kv} are not made of whole blocks of"
                f" {self.block_q} x {self.block_kv}"
            )
        fine, shape = self.kinds(), (grid.rows * rows, grid.columns * columns)
        kinds = jnp.pad(fine, _edges(fine, shape))
        cut = kinds.reshape(*kinds.shape[:2], grid.rows, rows, grid.columns, columns)
        past = jnp.arange(grid.rows * rows).reshape(grid.rows, rows) >= self.grid.rows
        whole = (cut == ls.FULL) | past[None, None, :, :, None, None]
        cover = ls.Cover((cut > ls.EMPTY).any((3, 5)), whole.all((3, 5)))
        width = min(rows * self.ids.shape[-1], grid.columns)
        table = ls.clipped(ls.ordered(ls.as_kinds(cover)), capacity or width)
        grants, elements = self._granted(kinds), self.elements
        if elements is not None:
            shape = grants.shape[2], grid.columns * block_kv
            elements = jnp.pad(elements, _edges(elements, shape))
        if block_kv > self.block_kv:
            fine = grants.repeat(self.block_kv, 3)
            grants, elements = None, fine if elements is None else fine & elements
        blocks = {"block_q": block_q, "block_kv": block_kv}
        return self.replace(
            **table._asdict(), **blocks, grants=grants, elements=elements
        )

    def _granted(self, kinds: Array) -> Array:
        """Whether a query may read a block at all, "b h t j", from padded ``kinds``."""
        kinds = kinds.repeat(self.block_q, 2)
        if self.grants is None:
            return kinds > ls.EMPTY
        given = jnp.pad(self.grants, _edges(self.grants, kinds.shape[2:]))
        return (kinds == ls.FULL) | ((kinds > ls.EMPTY) & given)

    def to_dense(self) -> Bool[Array, "b h t s"]:
        """Which query reads which key, element by element."""
        kinds = self.kinds().repeat(self.block_q, 2).repeat(self.block_kv, 3)
        i = jnp.arange(kinds.shape[2], dtype="int32")[:, None] + self.q_offset
        j = jnp.arange(kinds.shape[3], dtype="int32")[None]
        allowed = jnp.ones((1, 1, *kinds.shape[2:]), bool)
        if self.patterns:
            each = jnp.stack([p(i, j) for p in self.patterns])
            allowed = each[self._choice()][None]
        if self.elements is not None:
            allowed = allowed & self.elements
        if self.grants is not None:
            allowed = allowed & jnp.asarray(self.grants).repeat(self.block_kv, 3)
        visible = (kinds == ls.FULL) | ((kinds == ls.PARTIAL) & allowed)
        return visible[:, :, : self.q_len, : self.kv_len]

    def to_text(self, *, batch: int = 0, head: int = 0) -> str:
        """Draw the blocks of one head: ``#`` full, ``+`` partial, ``.`` empty."""
        return "\n".join(
            "".join(".+#"[kind] for kind in row)
            for row in np.asarray(self.kinds())[batch, head]
        )

    def _choice(self) -> Any:
        return np.zeros(1, "int32") if self.choice is None else self.choice

    def __repr__(self) -> str:
        size = (
            f"{self.q_len} x {self.kv_len} in {self.block_q} x {self.block_kv} blocks"
        )
        if not isinstance(self.count, jax.Array | np.ndarray) or ls.is_traced(
            self.count
        ):
            return f"BlockMask({size}, traced)"
        return f"BlockMask({size}, density {self.density():.4f})"


def _flatten(mask: BlockMask) -> tuple[Any, Any]:
    leaves = [
        (jax.tree_util.GetAttrKey(f.name), getattr(mask, f.name))
        for f in fields(mask)
        if f.name not in _STATIC
    ]
    return leaves, tuple(getattr(mask, name) for name in _STATIC)


def _unflatten(static: Any, leaves: Any) -> BlockMask:
    # Not through __init__: JAX also builds trees of specs, axes and placeholders.
    mask = object.__new__(BlockMask)
    names = [f.name for f in fields(BlockMask) if f.name not in _STATIC]
    for name, value in [
        *zip(names, leaves, strict=True),
        *zip(_STATIC, static, strict=True),
    ]:
        object.__setattr__(mask, name, value)
    return mask


jax.tree_util.register_pytree_with_keys(BlockMask, _flatten, _unflatten)


def _edges(x: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Padding that gives the last two axes of ``x`` this shape."""
    ends = zip(x.shape[2:], shape, strict=True)
    return [(0, 0), (0, 0), *((0, n - m) for m, n in ends)]


def _offset(q_offset: Any) -> Any:
    return q_offset if isinstance(q_offset, jax.Array) else np.int32(q_offset)


def _grid(q_len: int, kv_len: int, block_q: int, block_kv: int) -> ls.Grid:
    grid = ls.Grid(*map(operator.index, (q_len, kv_len, block_q, block_kv)))
    for name, value in grid._asdict().items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    return grid
