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
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.rule import Rule, Score
from pallas_kernels.gpu.skeleton import (
    Lists,
    Piece,
    Plan,
    Program,
    Traffic,
    launch,
)
from pallas_kernels.gpu.tiles import (
    PER_ROW,
    ROWS,
    accumulate,
    constant,
    finish,
    laid,
    product,
    put,
    spread,
    transposed,
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
    dtype, keys = arrays["q"].dtype, ("k", "bias") if score.biased else ("k",)

    def body(program: Program) -> None:
        q, do, slopes = (program.own(name) for name in ("q", "do", "slopes"))
        lse, delta = (
            plgpu.load(program.own(name), layout=PER_ROW) for name in ("lse", "delta")
        )

        def step(acc: Any, piece: Piece, carry: None, *, ruled: bool) -> None:  # noqa: ARG001
            with piece.fed(*keys) as (k, *bias):
                s = product(q, transposed(k))
                x, tanh = score.logits(s, *(laid(x, s.shape, 1) for x in bias))
                p = jnp.exp2(x * score.unit - spread(lse, s.shape, 0))
                if ruled:
                    at = program.start, piece.start
                    seen = rule.visible(piece, *at, s.shape, queries=0)
                    p = jnp.where(seen, p, 0.0)
                weights = p if tanh is None else p * (1.0 - tanh * tanh)
                with piece.fed("v") as (v,):
                    gap = product(do, transposed(v)) - spread(delta, s.shape, 0)
                put(slopes, weights * gap)
                accumulate(acc, slopes, k)
                finish()

        def run(acc: Any) -> jax.Array:
            program.walk(functools.partial(step, acc), None)
            return acc[...]

        # An accumulator that is only added to stays open around the loops.
        dq = pl.run_scoped(run, plgpu.ACC((ROWS, c), jnp.float32))
        program.store(("dq", q, dq * score.scale))

    traffic = Traffic(
        arrays=arrays,
        own=("q", "do", "lse", "delta"),
        streams=(keys, ("v",)),
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
        plan: sizes; own tiles are keys, walked tiles queries of all heads of a group.
        score: from products to logits.
        rule: which elements of the blocks past ``full`` are visible.
    """
    b, s_len, g, c = arrays["k"].shape
    dtype, added = arrays["k"].dtype, ("bias",) if score.biased else ()

    def body(program: Program) -> None:
        k, v, work = (program.own(name) for name in ("k", "v", "work"))
        bias = [plgpu.load(program.own(x), layout=PER_ROW) for x in added]

        def step(dk: Any, dv: Any, piece: Piece, dbias: Any, *, ruled: bool) -> Any:
            with piece.fed("q", "lse") as (q, lse):
                s = product(k, transposed(q))
                x, tanh = score.logits(s, *(spread(x, s.shape, 0) for x in bias))
                # As late as possible, here and below: registers are scarce.
                p = jnp.exp2(x * score.unit - laid(lse, s.shape, 1))
                if ruled:
                    at = piece.start, program.start
                    seen = rule.visible(piece, *at, s.shape, queries=1)
                    p = jnp.where(seen, p, 0.0)
                # The slope joins the weights at once: tanh, too, takes registers.
                weights = p if tanh is None else p * (1.0 - tanh * tanh)
                put(work, p)
                with piece.fed("do", "delta") as (do, delta):
                    accumulate(dv, work, do)
                    dp = product(v, transposed(do))
                    gap = dp - laid(delta, s.shape, 1)
                    dbias = dbias + (p * gap).sum(axis=1) if added else None
                    put(work, weights * gap)
                accumulate(dk, work, q)
                finish()
            return dbias

        def run(dk: Any, dv: Any) -> tuple[Any, Any, Any]:
            none = constant(0.0, (ROWS,), PER_ROW) if added else None
            dbias = program.walk(functools.partial(step, dk, dv), none)
            return dk[...], dv[...], dbias

        accumulator = plgpu.ACC((ROWS, c), jnp.float32)
        dk, dv, dbias = pl.run_scoped(run, accumulator, accumulator)
        more = [("dbias", program.own(x), dbias) for x in added]
        program.store(("dk", k, dk * score.scale), ("dv", v, dv), *more)

    gradient = jax.ShapeDtypeStruct((b, s_len, g, c), dtype)
    row = jax.ShapeDtypeStruct((b, g, s_len), jnp.float32)
    traffic = Traffic(
        arrays=arrays,
        own=("k", "v", *added),
        streams=(("q", "lse"), ("do", "delta")),
        outputs={"dk": gradient, "dv": gradient} | {"d" + n: row for n in added},
        work={"work": ((plan.step,), dtype)},
    )
    grid = s_len // plan.own, b, g
    return launch(body, plan=plan, grid=grid, lists=lists, traffic=traffic)
