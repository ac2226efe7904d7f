"""The reference: masked softmax as NumPy computes it, in the precision it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import (
    PATTERNS,
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_and_lse,
    causal,
    full,
)
from tests.attention.test_patterns import EXAMPLES, NONCAUSAL

T, BLOCKS = 24, {"block_q": 4, "block_kv": 4}


def arrays(dtype="float64"):
    draw = np.random.default_rng(0).normal
    shapes = (3, T, 4, 8), (3, T, 2, 8), (3, T, 2, 8)
    return [draw(size=shape).astype(dtype) for shape in shapes]


def exponentials(q, k, *, softcap=np.inf):
    logits = np.einsum("bthc,bshc->bhts", q, k.repeat(2, axis=2)) * 8**-0.5
    return np.exp(logits if np.isinf(softcap) else softcap * np.tanh(logits / softcap))


def mean(weights, v):
    total = np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bhts,bshc->bthc", weights / total, v.repeat(2, axis=2))


def visible(rule):
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    return np.broadcast_to(rule(i, j), (T, T))


def test_the_reference_keeps_double_precision():
    q, k, v = arrays()
    sinks = np.array([-1.0, 0.0, 0.5, 2.0])
    mask = BlockMask.from_pattern(causal(), q_len=T, kv_len=T, **BLOCKS)
    given = {"softcap": 3.0, "implementation": "reference"}
    attend = functools.partial(block_sparse_attention_and_lse, **given)
    with jax.enable_x64(True):
        found = jax.jit(attend)(q, k, v, mask, sinks=sinks)
    weights = exponentials(q, k, softcap=3.0) * visible(causal())
    total = weights.sum(-1) + np.exp(sinks)[None, :, None]
    kept = (weights.sum(-1) / total).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(found.values, kept * mean(weights, v), rtol=1e-12)
    np.testing.assert_allclose(found.lse, np.log(total), rtol=1e-12)


@jax.jit
def attend(q, k, v, dense):
    mask = BlockMask.from_dense(dense, **BLOCKS)
    return block_sparse_attention(q, k, v, mask)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_a_patterns_error_is_the_dropped_mass_times_the_distance_of_means(name):
    q, k, v = arrays("float32")
    every = visible(full() if name in NONCAUSAL else causal())
    kept = visible(PATTERNS[name](**EXAMPLES[name])) & every
    error = attend(q, k, v, every) - attend(q, k, v, kept)
    weights = exponentials(q, k) * every
    dropped = (weights * ~kept).sum(-1) / weights.sum(-1)
    gap = mean(weights * ~kept, v) - mean(weights * kept, v)
    expected = dropped.swapaxes(1, 2)[..., None] * gap
    np.testing.assert_allclose(error, expected, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_permuting_batch_and_head_groups_permutes_the_output(name):
    q, k, v = arrays("float32")
    dense = visible(PATTERNS[name](**EXAMPLES[name]))
    order, heads = jnp.array([2, 0, 1]), jnp.array([2, 3, 0, 1])
    turned = attend(
        q[order][:, :, heads], k[order][:, :, ::-1], v[order, :, ::-1], dense
    )
    found = attend(q, k, v, dense)[order][:, :, heads]
    np.testing.assert_allclose(turned, found, rtol=1e-5, atol=1e-6)
