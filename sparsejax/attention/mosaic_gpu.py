"""Attention over live blocks on Hopper GPUs, by the kernels of ``pallas_kernels.gpu``.

Here arrays are padded to whole blocks, the mask's tables are laid out for the kernels,
and the gradient is put together. A few queries on a long cache take a way of their
own: the query heads of a group lie below one another in one tile, and the keys are
split over programs whose results are merged by their log-denominators.

Source: Dao 2023, arXiv:2307.08691, Sec. 3.1. Departure: the lists of a block mask.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import KernelError, gpu
from pallas_kernels.gpu import device
from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.restrict import restrict
from sparsejax.compat import HAS_MOSAIC_GPU
from sparsejax.partition import alike
from sparsejax.typing import Array, Float

__all__ = ["mosaic_gpu", "obstacle"]

LOG2E = math.log2(math.e)
ROWS = 64  # of the smallest tile
WIDEST = 128  # head width that registers hold
PROGRAMS = 132  # multiprocessors of the device
LEAST_BLOCKS = 4  # of a split list


def mosaic_gpu(
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
    """Online softmax over the live blocks; values come back in the inputs' dtype.

    Raises:
        KernelError: if device, dtype, head width or blocks are not for these kernels.
    """
    if reason := obstacle(q, mask):
        raise KernelError(f"implementation='mosaic_gpu' {reason}")
    if segments is not None:
        mask = restrict(mask, segments)
    # Under a mesh: gradients of what was gathered are summed where it was gathered.
    q, k, v, bias = alike((q, k, v, bias), q, k, v, mask, segments, bias)
    if scale <= 0:  # the kernels' running maximum wants a positive factor
        q, scale = q * (-1 if scale else 0), abs(scale) or 1.0
    score = gpu.Score(scale=scale, softcap=softcap, biased=bias is not None)
    return _attend(q, k, v, bias, mask, segments, score)


def obstacle(q: Array, mask: BlockMask) -> str | None:
    """Say why these kernels cannot take such queries and mask; None if they can."""
    if q.dtype not in ("bfloat16", "float16"):
        return (
            f"with {q.dtype}: the tensor cores take bfloat16 and float16; cast q, k and"
            " v, or use 'xla'"
        )
    if q.shape[3] > WIDEST:
        return (
            f"with heads of {q.shape[3]}: from {WIDEST} on the accumulators spill out"
            " of the registers (1 kB a thread at 256); use more heads, or 'xla'"
        )
    grid = mask.grid
    sizes = ("block_q", grid.rows), ("block_kv", grid.columns)
    if any(count > 1 and getattr(grid, name) % ROWS for name, count in sizes):
        fine = grid.block_q, grid.block_kv
        coarse = [math.lcm(n, ROWS) for n in fine]
        return (
            f"with blocks of {fine[0]} x {fine[1]}: they must be multiples of {ROWS};"
            f" use mask.coarsened({coarse[0]}, block_kv={coarse[1]}), or 'xla'"
        )
    return device.obstacle(supported=HAS_MOSAIC_GPU)


class _Layout(NamedTuple):
    """Static sizes: how arrays of any length become whole tiles."""

    q_len: int
    kv_len: int
    block_q: int  # a block that is alone is only as long as it must be
    block_kv: int
    rows: int
    columns: int
    heads: int
    group: int  # query heads per key head
    fold: int = 1  # query heads that lie below one another
    splits: int = 1

    @classmethod
    def of(cls, q: Array, k: Array, mask: BlockMask) -> "_Layout":
        grid, heads = mask.grid, q.shape[2]
        block_q = grid.block_q if grid.rows > 1 else _up(grid.q_len)
        block_kv = grid.block_kv if grid.columns > 1 else _up(grid.kv_len)
        sizes = (grid.q_len, grid.kv_len, block_q, block_kv, grid.rows, grid.columns)
        return cls(*sizes, heads, heads // k.shape[2])

    def of_few_queries(self, mask: BlockMask, batch: int) -> "_Layout":
        """Fold the heads of a group and split the keys, if that fills the device."""
        tables = (mask.ids, mask.elements, mask.grants)
        shared = all(x is None or x.shape[1] == 1 for x in tables)
        if self.rows > 1 or self.q_len > ROWS:
            return self
        fold = self.group if shared and self.group * self.q_len <= ROWS else 1
        programs = batch * self.heads // fold
        most = mask.ids.shape[-1] // LEAST_BLOCKS
        splits = max(1, min(PROGRAMS // programs, most))
        return self._replace(fold=fold, splits=splits, block_q=ROWS)

    def queries(self, x: Any, axis: int, value: float = 0.0) -> Array:
        """Bring the query axis of a table to the length of the tiles."""
        x = jax.lax.slice_in_dim(jnp.asarray(x), 0, self.q_len, axis=axis)
        x = jnp.concatenate([x] * self.fold, axis)
        return _pad(x, axis, self.rows * self.block_q, value)

    def keys(self, x: Any, axis: int) -> Array:
        """Bring the key axis of a table to the length of the tiles."""
        x = jax.lax.slice_in_dim(jnp.asarray(x), 0, self.kv_len, axis=axis)
        return _pad(x, axis, self.columns * self.block_kv)

    def folded(self, x: Array) -> Array:
        """[b, t, h, c] to [b, fold * t, h / fold, c], padded."""
        b, t, h, c = x.shape
        x = x.reshape(b, t, h // self.fold, self.fold, c).transpose(0, 3, 1, 2, 4)
        x = x.reshape(b, self.fold * t, h // self.fold, c)
        return _pad(x, 1, self.rows * self.block_q)

    def unfolded(self, x: Array, c: int) -> Array:
        """Undo ``folded``, of head width ``c``."""
        b, _, h, _ = x.shape
        x = x[:, : self.fold * self.q_len, :, :c]
        x = x.reshape(b, self.fold, self.q_len, h, c).transpose(0, 2, 3, 1, 4)
        return x.reshape(b, self.q_len, h * self.fold, c)

    def plan(self, *, step: int, in_turns: bool = False) -> gpu.Plan:
        """Sizes of kernels whose programs own queries."""
        return gpu.Plan(
            heads=self.heads // self.fold,
            own=_tile(self.block_q),
            step=step,
            own_block=self.block_q,
            step_block=self.block_kv,
            splits=self.splits,
            in_turns=in_turns,
        )


def _up(n: int) -> int:
    return -(-n // ROWS) * ROWS


def _tile(block: int) -> int:
    return 2 * ROWS if block % (2 * ROWS) == 0 else ROWS


def _pad(x: Array, axis: int, length: int, value: float = 0.0) -> Array:
    edges = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, edges, constant_values=value) if max(edges) > (0, 0) else x


def _wide(x: Array) -> Array:
    """Heads as wide as a swizzled tile."""
    return _pad(x, 3, -(-x.shape[3] // 32) * 32)


def _rule(mask: BlockMask, layout: _Layout) -> gpu.Rule:
    return gpu.Rule(
        kv_len=layout.kv_len,
        kv_block=layout.block_kv,
        patterns=mask.patterns,
        fold=layout.q_len if layout.fold > 1 else None,
    )


def _tables(mask: BlockMask, segments: Segments | None, layout: _Layout) -> dict:
    """What the element rule reads."""
    tables = {}
    if mask.patterns:
        tables["offset"] = jnp.asarray(mask.q_offset).reshape(1)
    if mask.choice is not None:
        tables["choice"] = jnp.asarray(mask.choice)
    if mask.elements is not None:
        elements = layout.keys(layout.queries(mask.elements, 2), 3)
        tables["elements"] = elements.astype("int8")
    if mask.grants is not None:
        tables["grants"] = layout.queries(mask.grants, 2).mT.astype("int8")
    if segments is not None:
        tables["q_segments"] = layout.queries(segments.q, 1)
        tables["kv_segments"] = layout.keys(segments.kv, 1)
    return tables


def _key_arrays(k: Array, v: Array, bias: Array | None, layout: _Layout) -> dict:
    arrays = {name: layout.keys(_wide(x), 1) for name, x in (("k", k), ("v", v))}
    return arrays if bias is None else arrays | {"bias": layout.keys(bias, 2) * LOG2E}


def _lists(lists: Any, splits: int = 1) -> gpu.Lists:
    """Lists of the kernels; ``splits`` cuts the list of a single row into rows."""
    ids, count, full = (jnp.asarray(x) for x in lists)
    if splits == 1:
        return gpu.Lists(ids, count, full)
    width = -(-ids.shape[-1] // splits)
    ids = _pad(ids, 3, width * splits).reshape(*ids.shape[:2], splits, width)
    start = jnp.arange(splits, dtype="int32") * width
    count, full = (
        jnp.clip(n - start.reshape(1, 1, splits), 0, width) for n in (count, full)
    )
    return gpu.Lists(ids, count, full)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, bias, mask, segments, score) -> Attended:
    return _forward(q, k, v, bias, mask, segments, score)


def _forward(q, k, v, bias, mask, segments, score: gpu.Score) -> Attended:
    layout = _Layout.of(q, k, mask).of_few_queries(mask, q.shape[0])
    arrays = {"q": layout.folded(_wide(q))} | _key_arrays(k, v, bias, layout)
    found = gpu.forward(
        arrays | _tables(mask, segments, layout),
        _lists(mask.lists, layout.splits),
        # Narrow heads multiply too briefly for the other warpgroup to wait for it.
        plan=layout.plan(step=_tile(layout.block_kv), in_turns=q.shape[3] > ROWS),
        score=score,
        rule=_rule(mask, layout),
    )
    values, lse = _merged(found["out"], found["lse"], layout.splits)
    lse = layout.unfolded(lse.mT[..., None], 1)[..., 0].mT
    attended = Attended(layout.unfolded(values, q.shape[3]), lse / LOG2E)
    # Kernels do not say over which mesh axes their results vary.
    return alike(attended, q, k, v, bias, mask, segments).named()


def _merged(values: Array, lse: Array, splits: int) -> tuple[Array, Array]:
    """Join the softmaxes of ``splits`` parts of the keys, each in base 2."""
    if splits == 1:
        return values, lse
    values = values.reshape(values.shape[0], splits, -1, *values.shape[2:])
    lse = lse.reshape(*lse.shape[:2], splits, -1)
    top = lse.max(axis=2, keepdims=True)
    weights = jnp.exp2(lse - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(axis=2, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    mixed = jnp.einsum("bhnt,bnthc->bthc", weights, values.astype("float32"))
    return mixed.astype(values.dtype), (top + jnp.log2(total))[:, :, 0]


def _attend_forward(q, k, v, bias, mask, segments, score):
    attended = _forward(q, k, v, bias, mask, segments, score)
    return attended, (q, k, v, bias, mask, segments, attended)


def _attend_backward(score: gpu.Score, saved, cotangent: Attended):
    q, k, v, bias, mask, segments, attended = saved
    layout, c = _Layout.of(q, k, mask), q.shape[3]
    do = cotangent.values
    blind = jnp.isinf(attended.lse)
    delta = jnp.einsum(
        "bthc,bthc->bht", do, attended.values, preferred_element_type=jnp.float32
    ) - jnp.where(blind, 0, cotangent.lse)
    # With +inf where nothing was seen, exp2(logit - lse) is 0 and not NaN.
    lse = jnp.where(blind, jnp.inf, attended.lse * LOG2E)
    arrays = {name: layout.queries(_wide(x), 1) for name, x in (("q", q), ("do", do))}
    arrays["lse"] = layout.queries(lse, 2, jnp.inf)
    arrays["delta"] = layout.queries(delta, 2)
    arrays |= _key_arrays(k, v, bias, layout) | _tables(mask, segments, layout)
    run = {"score": score, "rule": _rule(mask, layout)}
    # Walked tiles of 64: larger ones spill.
    plan = layout.plan(step=ROWS)
    dq = gpu.query_gradient(arrays, _lists(mask.lists), plan=plan, **run)["dq"]
    if "elements" in arrays:
        arrays["elements"] = arrays["elements"].mT
    plan = gpu.Plan(
        heads=layout.heads,
        own=_tile(layout.block_kv),
        step=ROWS,
        own_block=layout.block_kv,
        step_block=layout.block_q,
        last_first=False,
    )
    keys = gpu.key_gradients(arrays, _lists(mask.transpose()), plan=plan, **run)
    dk, dv = (keys[name][:, : k.shape[1], :, :c] for name in ("dk", "dv"))
    dbias = keys["dbias"][:, :, : k.shape[1]] if score.biased else None
    slopes = alike((dq[:, : q.shape[1], :, :c], dk, dv, dbias), q, k, v, cotangent)
    return *slopes, None, None


_attend.defvjp(_attend_forward, _attend_backward)
