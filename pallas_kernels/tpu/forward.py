"""Forward: a softmax that grows with every block of keys."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.blocks import TN, Tensors, Tiling, logits, product
from pallas_kernels.tpu.launch import Body, Output, launch
from pallas_kernels.tpu.pairs import Pairs

__all__ = ["forward"]

# The running maximum starts finite: a hidden logit is -inf, and exp(-inf - m) is 0.
FLOOR = -1e30


def forward(
    pairs: Pairs, where: jax.Array, tensors: Tensors, tiling: Tiling
) -> list[jax.Array]:
    """Give values "o r q c" and log-denominators "o r 1 q"; 0 and -inf of no keys."""
    q, c = tensors.q.shape[2:]
    outputs = Output((q, c), tensors.q.dtype), Output((1, q), jnp.float32)
    scratch = (1, q), (1, q), (c, q)
    return launch(
        _body, pairs, where, tensors, outputs, scratch, tiling=tiling, by_key=False
    )


def _body(tensors: Tensors, outputs: Any, scratch: Any, tiling: Tiling) -> Body:
    out, lse = outputs
    top, total, mixed = scratch

    def start() -> None:
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    def step(visible: Any) -> None:
        s, _ = logits(tensors, visible, tiling)
        m = jnp.maximum(top[...], s.max(axis=0, keepdims=True))
        p, kept = jnp.exp(s - m), jnp.exp(top[...] - m)
        v = tensors.v[...]
        top[...] = m
        total[...] = total[...] * kept + p.sum(axis=0, keepdims=True)
        mixed[...] = mixed[...] * kept + product(v, p.astype(v.dtype), TN)

    def finish() -> None:
        blind = total[...] == 0
        sure = jnp.where(blind, 1.0, total[...])
        out[...] = (mixed[...] / sure).T.astype(out.dtype)
        lse[...] = jnp.where(blind, -jnp.inf, top[...] + jnp.log(sure))

    return start, step, finish
