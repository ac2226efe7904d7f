"""Backward: dQ along the rows of queries, dK and dV along the rows of keys.

With weights p = exp(s - lse), cotangents do of the values and dlse of the
log-denominators, and delta = sum(values * do) - dlse:

    dv = sum p do,   ds = p (v do - delta),   dq = sum ds k,   dk = sum ds q

where ds is further multiplied by the slope of the logits.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.blocks import NN, NT, TN, Tensors, Tiling, logits, product
from pallas_kernels.tpu.launch import Body, Output, launch
from pallas_kernels.tpu.pairs import Pairs

__all__ = ["by_keys", "by_queries"]


def by_queries(
    pairs: Pairs, where: jax.Array, tensors: Tensors, tiling: Tiling
) -> list[jax.Array]:
    """Give dQ, "o r q c"; ``pairs`` has query blocks for rows."""
    block = tensors.q.shape[2:]
    outputs = (Output(block, tensors.q.dtype),)
    return launch(
        _query_body,
        pairs,
        where,
        tensors,
        outputs,
        (block,),
        tiling=tiling,
        by_key=False,
    )


def by_keys(
    pairs: Pairs, where: jax.Array, tensors: Tensors, tiling: Tiling
) -> list[jax.Array]:
    """Give dK and dV, "o r k c", and with a bias its gradient "o r 1 k".

    ``pairs`` has key blocks for rows.
    """
    k, c = tensors.k.shape[2:]
    outputs = (Output((k, c), tensors.k.dtype),) * 2
    scratch = ((k, c),) * 2
    if tensors.bias is not None:
        outputs += (Output((1, k), jnp.float32),)
        scratch += ((k, 1),)
    return launch(
        _key_body, pairs, where, tensors, outputs, scratch, tiling=tiling, by_key=True
    )


def _weights(tensors: Tensors, visible: Any, tiling: Tiling) -> tuple[Any, Any, Any]:
    """Weights, the gradient of the logits, and that of the scaled products; [k, q]."""
    s, slope = logits(tensors, visible, tiling)
    # Where a query sees nothing lse is +inf, so that p is 0 and not NaN.
    p = jnp.exp(s - tensors.lse[...])
    ds = p * (product(tensors.v[...], tensors.do[...], NT) - tensors.delta[...])
    return p, ds, ds if slope is None else ds * slope


def _query_body(tensors: Tensors, outputs: Any, scratch: Any, tiling: Tiling) -> Body:
    (out,), (dq,) = outputs, scratch

    def start() -> None:
        dq[...] = jnp.zeros_like(dq)

    def step(visible: Any) -> None:
        _, _, ds = _weights(tensors, visible, tiling)
        k = tensors.k[...]
        dq[...] += product(ds.astype(k.dtype), k, TN)

    def finish() -> None:
        out[...] = (dq[...] * tiling.scale).astype(out.dtype)

    return start, step, finish


def _key_body(tensors: Tensors, outputs: Any, scratch: Any, tiling: Tiling) -> Body:
    dk, dv, *dbias = scratch

    def start() -> None:
        for x in scratch:
            x[...] = jnp.zeros_like(x)

    def step(visible: Any) -> None:
        p, dlogits, ds = _weights(tensors, visible, tiling)
        q, do = tensors.q[...], tensors.do[...]
        dv[...] += product(p.astype(do.dtype), do, NN)
        dk[...] += product(ds.astype(q.dtype), q, NN)
        for x in dbias:
            x[...] += dlogits.sum(axis=1, keepdims=True)

    def finish() -> None:
        outputs[0][...] = (dk[...] * tiling.scale).astype(outputs[0].dtype)
        outputs[1][...] = dv[...].astype(outputs[1].dtype)
        for out, x in zip(outputs[2:], dbias, strict=True):
            out[...] = x[...].T

    return start, step, finish
