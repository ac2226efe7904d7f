"""Forward pass: online softmax over the listed key tiles."""

from typing import Any

import jax
import jax.numpy as jnp

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
    constant,
    fence,
    laid,
    product,
    put,
    spread,
    transposed,
)

__all__ = ["forward"]


def forward(
    arrays: dict[str, jax.Array],
    lists: Lists,
    *,
    plan: Plan,
    score: Score,
    rule: Rule,
) -> dict[str, jax.Array]:
    """Give ``out`` "b t h c" and ``lse`` "b h t", the log-denominator in base 2.

    A query without a visible key gets 0 and -inf.

    Args:
        arrays: ``q`` "b t h c", ``k`` and ``v`` "b s g c", if wanted ``bias`` "b g s"
            in base 2, and the rule's arrays; lengths are whole blocks.
        lists: key blocks of the query blocks.
        plan: sizes; own tiles are queries, walked tiles keys.
        score: from products to logits.
        rule: which elements of the blocks past ``full`` are visible.
    """
    b, t, h, c = arrays["q"].shape
    dtype, keys = arrays["q"].dtype, ("k", "bias") if score.biased else ("k",)

    def body(own: Own, pieces: Any) -> None:
        q, weights = own.tile("q"), own.tile("weights")

        def step(piece: Piece, carry: Any, *, ruled: bool) -> Any:
            out, top, total = carry
            with piece.fed(*keys) as (k, *bias):
                s = product(q, transposed(k), meanwhile=own.meet)
                x, _ = score.logits(s, *(laid(x, s.shape, 1) for x in bias))
                if bias:
                    fence()  # a plain read ends before the next copy into its place
            if ruled:
                at = own.start, piece.start
                seen = rule.visible(piece, *at, s.shape, queries=0)
                x = jnp.where(seen, x, -jnp.inf)
            higher = jnp.maximum(top, x.max(axis=1))
            shift = jnp.where(higher == -jnp.inf, 0.0, higher * score.unit)
            p = jnp.exp2(x * score.unit - spread(shift, x.shape, 0))
            kept = jnp.exp2(top * score.unit - shift)
            total = total * kept + p.sum(axis=1)
            put(weights, p)
            own.meet()
            with piece.fed("v") as (v,):
                out = out * spread(kept, out.shape, 0) + product(weights, v)
            return out, higher, total

        none = constant(0.0, (ROWS,), PER_ROW)
        start = constant(0.0, (ROWS, c)), constant(-jnp.inf, (ROWS,), PER_ROW), none
        own.half_a_turn(1)
        out, top, total = own.walk(step, start, pieces)
        own.half_a_turn(0)
        inverse = jnp.where(
            total == 0.0, 0.0, 1.0 / jnp.where(total == 0.0, 1.0, total)
        )
        own.store(
            ("out", q, out * spread(inverse, out.shape, 0)),
            ("lse", own.tile("lse"), top * score.unit + jnp.log2(total)),
        )

    rows = t * plan.splits
    traffic = Traffic(
        arrays=arrays,
        own=("q",),
        streams=(keys, ("v",)),
        outputs={
            "out": jax.ShapeDtypeStruct((b, rows, h, c), dtype),
            "lse": jax.ShapeDtypeStruct((b, h, rows), jnp.float32),
        },
        work={"weights": ((plan.step,), dtype), "lse": ((), jnp.float32)},
    )
    grid = rows // plan.own, b, h
    return launch(body, plan=plan, grid=grid, lists=lists, traffic=traffic)
