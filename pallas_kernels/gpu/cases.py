"""Problems that matter: compiled for absent devices, checked and timed on present ones.

All are causal, some within a window. ``spills`` holds the bytes that the assembler may
spill in the forward pass, the query gradient and the key gradients.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.backward import key_gradients, query_gradient
from pallas_kernels.gpu.forward import forward
from pallas_kernels.gpu.rule import LOG2E, Rule, Score
from pallas_kernels.gpu.skeleton import Lists, Plan
from pallas_kernels.gpu.tiles import ROWS

__all__ = ["CASES", "Case", "arrays", "kernels", "lists", "pattern", "tile"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Self-attention of one length."""

    length: int = 8192
    batch: int = 1
    heads: int = 16
    key_heads: int = 16
    width: int = 128
    block_q: int = 128
    block_kv: int = 128
    window: int | None = None
    softcap: float | None = None
    extras: bool = False  # bias, elements, segments, grants and two patterns by head
    dtype: str = "bfloat16"
    in_turns: bool = False  # of the warpgroups, in the forward pass
    programs: int | None = None  # that share the tiles
    spills: tuple[int, int, int] = (0, 0, 136)


CASES = {
    "causal": Case(),
    "in_turns": Case(in_turns=True),
    "persistent": Case(in_turns=True, programs=132),
    "persistent_window": Case(length=32768, window=256, programs=132),
    "narrow": Case(width=64),
    "grouped": Case(key_heads=4),
    "window": Case(length=32768, window=1024),
    "narrow_window": Case(length=32768, window=256),
    "small_blocks": Case(block_q=64, block_kv=64, window=1024),
    "softcap": Case(softcap=30.0),
    "float16": Case(dtype="float16", width=64),
    "width_32": Case(width=32),
    "width_96": Case(width=96),
    "extras": Case(
        extras=True,
        softcap=30.0,
        length=2048,
        key_heads=4,
        spills=(704, 136, 656),
    ),
}


def tile(block: int) -> int:
    """Give the largest tile that divides a block."""
    return 2 * ROWS if block % (2 * ROWS) == 0 else ROWS


def pattern(case: Case) -> Callable[[Any, Any], Any]:
    """Which query position reads which key position."""
    if case.window is None:
        return lambda i, j: i >= j
    return lambda i, j: (i >= j) & (i - j < case.window)


def lists(case: Case, *, by_keys: bool = False) -> Lists:
    """Key blocks of the query blocks, or the other way round."""
    window = case.window or case.length
    top = np.arange(0, case.length, case.block_q)[:, None]
    left = np.arange(0, case.length, case.block_kv)[None]
    bottom, right = top + case.block_q - 1, left + case.block_kv - 1
    some = (bottom >= left) & (top - right < window)
    every = (top >= right) & (bottom - left < window) & (not case.extras)
    kinds = some.astype(int) + (some & every)
    kinds = kinds.T if by_keys else kinds
    order = np.argsort(-kinds, axis=1, kind="stable")[:, : (kinds > 0).sum(1).max()]
    each = order, (kinds > 0).sum(1), (kinds > 1).sum(1)
    return Lists(*(jnp.asarray(x, "int32")[None, None] for x in each))


def arrays(case: Case, key: jax.Array) -> dict[str, jax.Array]:
    """Random operands of all kernels but ``lse`` and ``delta``, which forward gives."""
    b, t, h, c = case.batch, case.length, case.heads, case.width
    heads = {"q": h, "k": case.key_heads, "v": case.key_heads, "do": h}
    names = [*heads, "bias", "elements", "grants"]
    keys = dict(zip(names, jax.random.split(key, 7), strict=True))
    found = {
        name: jax.random.normal(keys[name], (b, t, n, c)).astype(case.dtype)
        for name, n in heads.items()
    }
    found["offset"] = jnp.zeros(1, "int32")
    if not case.extras:
        return found
    blocks = t // case.block_kv
    found["bias"] = LOG2E * jax.random.normal(keys["bias"], (b, case.key_heads, t))
    shapes = {"elements": (1, 1, t, t), "grants": (1, h, blocks, t)}
    for name, shape in shapes.items():
        found[name] = jax.random.bernoulli(keys[name], 0.8, shape).astype("int8")
    found["choice"] = jnp.arange(h, dtype="int32") % 2
    numbers = 1 + jnp.arange(t, dtype="int32")[None] * 4 // t
    found["q_segments"] = found["kv_segments"] = jnp.repeat(numbers, b, axis=0)
    return found


def kernels(case: Case) -> dict[str, Callable[..., dict[str, jax.Array]]]:
    """The three kernels of a case, as functions of arrays and lists."""
    patterns = (pattern(case), lambda i, j: (i - j) % 3 == 0)
    rule = Rule(
        kv_len=case.length,
        kv_block=case.block_kv,
        patterns=patterns if case.extras else patterns[:1],
    )
    score = Score(scale=case.width**-0.5, softcap=case.softcap, biased=case.extras)
    of_queries = functools.partial(
        Plan,
        heads=case.heads,
        own=tile(case.block_q),
        own_block=case.block_q,
        step_block=case.block_kv,
        programs=case.programs,
    )
    of_keys = Plan(
        heads=case.heads,
        own=tile(case.block_kv),
        step=ROWS,
        own_block=case.block_kv,
        step_block=case.block_q,
        last_first=False,
        programs=case.programs,
    )
    plans = {
        forward: of_queries(step=tile(case.block_kv), in_turns=case.in_turns),
        query_gradient: of_queries(step=ROWS),
        key_gradients: of_keys,
    }
    return {
        kernel.__name__: functools.partial(kernel, plan=plan, score=score, rule=rule)
        for kernel, plan in plans.items()
    }
