"""Backward passes: each walks its own lists, so that nothing is added atomically.

With weights ``P = exp2(logits - lse)``, ``delta = rowsum(dO * O) - dlse`` and the slope
of the softcap, the gradient of the logits is ``P * (dO V^T - delta)``, and that of the
products ``S = scale * slope * P * (dO V^T - delta)``; then ``dQ = S K``, ``dK = S^T Q``
and ``dV = P^T dO``.
Queries that see nothing come with ``lse = +inf``, which makes their weights 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gpu.rule import Rule, Score
from pallas_kernels.gpu.skeleton import (
    Lists,
    Own,
    Piece,
    Plan,
    Traffic,
    launch,
)
from pallas_kernels.gpu.tiles import (
    PER_ROW,
    ROWS,
    accumulate,
    accumulator,
    constant,
    laid,
    load,
    put,
    spread,
    transposed,
    value,
)

__all__ = ["key_gradients", "query_gradient"]


def query_gradient(
    arrays: dict[str, jax.Array],
    lists: Lists,
    *,
    plan: Plan,
    score: Score,
    rule: Rule,
) -> dict[str, jax.Array]:
    """Give ``dq`` "b t h c".

    Args:
        arrays: those of ``forward``, ``do`` "b t h c", ``lse`` (base 2) and ``delta``
            "b h t".
        lists: key blocks of the query blocks.
        plan: sizes; own tiles are queries, walked tiles keys.
        score: from products to logits.
        rule: which elements of the blocks past ``full`` are visible.
    """
    b, t, h, c = arrays["q"].shape
    dtype, walked = arrays["q"].dtype, ("k", "v", "bias")[: 2 + score.biased]

    def body(own: Own, pieces: Any) -> None:
        q, do, slopes = (own.tile(name) for name in ("q", "do", "slopes"))
        lse, delta = (load(own.tile(name), PER_ROW) for name in ("lse", "delta"))

        def step(acc: Any, piece: Piece, ruled: bool, s: Any, dp: Any) -> None:
            k, v, *bias = piece.wait(*walked)
            # The second product runs while the first one's is exponentiated.
            accumulate(s, q, transposed(k))
            accumulate(dp, do, transposed(v))
            s = value(s, behind=1)
            piece.free_last(*walked)
            x, tanh = score.logits(s, *(laid(x, s.shape, 1) for x in bias))
            p = jnp.exp2(x * score.unit - spread(lse, s.shape, 0))
            if ruled:
                at = own.start, piece.start
                seen = rule.visible(piece, *at, s.shape, queries=0)
                p = jnp.where(seen, p, 0.0)
            weights = p if tanh is None else p * (1.0 - tanh * tanh)
            gap = value(dp) - spread(delta, s.shape, 0)
            put(slopes, weights * gap)
            accumulate(acc, slopes, k)

        def run(acc: Any) -> jax.Array:
            def visit(piece: Piece, carry: None, *, ruled: bool) -> None:  # noqa: ARG001
                one = functools.partial(step, acc, piece, ruled)
                pl.run_scoped(one, *(accumulator(ROWS, plan.step),) * 2)

            own.walk(visit, None, pieces)
            return value(acc)

        # An accumulator that is only added to stays open around the loops.
        dq = pl.run_scoped(run, accumulator(ROWS, c))
        own.store(("dq", q, dq * score.scale))

    traffic = Traffic(
        arrays=arrays,
        own=("q", "do", "lse", "delta"),
        streams=(walked,),
        outputs={"dq": jax.ShapeDtypeStruct((b, t, h, c), dtype)},
        work={"slopes": ((plan.step,), dtype)},
    )
    grid = t // plan.own, b, h
    return launch(body, plan=plan, grid=grid, lists=lists, traffic=traffic)


def key_gradients(
    arrays: dict[str, jax.Array],
    lists: Lists,
    *,
    plan: Plan,
    score: Score,
    rule: Rule,
) -> dict[str, jax.Array]:
    """Give ``dk`` and ``dv`` "b s g c" and, if there is a bias, ``dbias`` "b g s".

    Args:
        arrays: those of ``query_gradient``, with ``elements`` transposed.
        lists: query blocks of the key blocks, for each query head.
        plan: sizes; own tiles are keys, walked tiles queries. Every query head has its
            own gradients, and those of a group are summed afterwards.
        score: from products to logits.
        rule: which elements of the blocks past ``full`` are visible.
    """
    b, s_len, g, c = arrays["k"].shape
    dtype, added = arrays["k"].dtype, ("bias",) if score.biased else ()
    walked = "q", "do", "lse", "delta"

    def body(own: Own, pieces: Any) -> None:
        k, v, work, slopes = (own.tile(x) for x in ("k", "v", "work", "slopes"))
        bias = [load(own.tile(x), PER_ROW) for x in added]

        def step(sums: Any, piece: Piece, dbias: Any, ruled: bool, *acc: Any) -> Any:
            (dk, dv), (s, dp) = sums, acc
            q, do, lse, delta = piece.wait(*walked)
            # The second product runs while the first one's is exponentiated.
            accumulate(s, k, transposed(q))
            accumulate(dp, v, transposed(do))
            s = value(s, behind=1)
            piece.free_last(*walked)
            x, tanh = score.logits(s, *(spread(x, s.shape, 0) for x in bias))
            # As late as possible, here and below: registers are scarce.
            p = jnp.exp2(x * score.unit - laid(lse, s.shape, 1))
            if ruled:
                at = piece.start, own.start
                seen = rule.visible(piece, *at, s.shape, queries=1)
                p = jnp.where(seen, p, 0.0)
            # The slope joins the weights at once: tanh, too, takes registers.
            weights = p if tanh is None else p * (1.0 - tanh * tanh)
            put(work, p)
            accumulate(dv, work, do)
            gap = value(dp, behind=1) - laid(delta, s.shape, 1)
            dbias = dbias + (p * gap).sum(axis=1) if added else None
            put(slopes, weights * gap)
            accumulate(dk, slopes, q)
            return dbias

        def run(dk: Any, dv: Any) -> tuple[Any, Any, Any]:
            def visit(piece: Piece, dbias: Any, *, ruled: bool) -> Any:
                one = functools.partial(step, (dk, dv), piece, dbias, ruled)
                return pl.run_scoped(one, *(accumulator(ROWS, plan.step),) * 2)

            start = constant(0.0, (ROWS,), PER_ROW) if added else None
            dbias = own.walk(visit, start, pieces)
            return value(dk), value(dv), dbias

        dk, dv, dbias = pl.run_scoped(run, *(accumulator(ROWS, c),) * 2)
        more = [("dbias", own.tile(x), dbias) for x in added]
        own.store(("dk", k, dk * score.scale), ("dv", v, dv), *more)

    gradient = jax.ShapeDtypeStruct((b, s_len, plan.heads, c), dtype)
    row = jax.ShapeDtypeStruct((b, plan.heads, s_len), jnp.float32)
    traffic = Traffic(
        arrays=arrays,
        own=("k", "v", *added),
        streams=(walked,),
        outputs={"dk": gradient, "dv": gradient} | {"d" + n: row for n in added},
        work=dict.fromkeys(("work", "slopes"), ((plan.step,), dtype)),
    )
    grid = s_len // plan.own, b, plan.heads
    found = launch(body, plan=plan, grid=grid, lists=lists, traffic=traffic)
    return {name: _joined(x, g) for name, x in found.items()}


def _joined(x: jax.Array, heads: int) -> jax.Array:
    """Sum over the query heads that share a key head, "b s h c" or "b h s"."""
    axis = x.ndim - 2
    if x.shape[axis] == heads:
        return x
    parts = x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])
    return parts.sum(axis + 1, dtype=jnp.float32).astype(x.dtype)
