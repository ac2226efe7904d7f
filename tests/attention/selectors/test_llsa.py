"""LLSA: chosen from coarse to fine, with coarse keys that count as many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention.selectors.llsa import LLSAOptions, llsa
from tests.attention.selecting import CLOSE, WIDTH, T, arrays, layer, run, value

OPTIONS = LLSAOptions(block=2, top=3, levels=2)


def pooled(x, times):
    for _ in range(times):
        x = x.reshape(x.shape[0] // 2, 2, *x.shape[1:]).mean(1)
    return x


def test_the_choice_goes_from_coarse_to_fine(key):
    q, k, _ = arrays(key, b=1, h=1, g=1)
    fine, coarse = llsa(q, k, options=OPTIONS)
    q, k = (np.asarray(x)[0, :, 0] for x in (q, k))
    first = pooled(q, 2) @ pooled(k, 2).T
    for row in range(6):
        best = np.argsort(-first[row])[:3]
        assert set(np.asarray(coarse.ids)[0, 0, row]) == set(best)
        for below in (2 * row, 2 * row + 1):
            parts = np.concatenate([[2 * x, 2 * x + 1] for x in best])
            scores = pooled(q, 1)[below] @ pooled(k, 1)[parts].T
            chosen = parts[np.argsort(-scores)[:3]]
            assert set(np.asarray(fine.ids)[0, 0, below]) == set(chosen)


def test_attention_is_one_softmax_over_tokens_and_coarse_keys(key):
    x = jax.random.normal(key, (1, T, WIDTH))
    model = layer("llsa", {"block": 2, "top": 3, "levels": 2})
    q, k, v, _ = model._project(x, jnp.arange(T, dtype="int32")[None], None, None)
    fine, coarse = llsa(q, k, options=OPTIONS)
    k, v = (np.asarray(y)[0] for y in (k, v))
    every = np.ones((4, T, 6), bool)
    visible = [fine.to_dense()[0], coarse.to_dense()[0], every]
    keys = np.concatenate([pooled(k, n) for n in range(3)]).repeat(2, 1)
    values = np.concatenate([pooled(v, n) for n in range(3)]).repeat(2, 1)
    many = np.log(np.array([1] * 24 + [2] * 12 + [4] * 6))
    logits = np.einsum("thc,shc->hts", q[0], keys) * 4**-0.5 + many
    logits = np.where(np.concatenate(visible, -1), logits, -np.inf)
    weights = jax.nn.softmax(jnp.asarray(logits, "float32"))
    mixed = jnp.einsum("hts,shc->thc", weights, values)
    expected = jnp.einsum("thc,hcd->td", mixed, model.out[...])
    np.testing.assert_allclose(value(model, x)[0], expected, **CLOSE)


def test_levels_follow_from_the_length():
    assert [LLSAOptions().depth(n) for n in (256, 4096, 65536)] == [1, 2, 3]


def test_lengths_fall_into_whole_coarsest_blocks():
    model = layer("llsa", {"block": 5, "top": 1, "levels": 2})
    with pytest.raises(ValueError, match=r"24 queries and 24 keys: .* multiples of 25"):
        model(jnp.zeros((1, T, WIDTH)), positions=jnp.zeros((1, T), "int32"))


def test_choosing_passes_no_gradient_but_coarse_keys_do(key):
    x = jax.random.normal(key, (1, T, WIDTH))
    model = layer("llsa", {"block": 2, "top": 1, "levels": 1})
    where = jnp.arange(T, dtype="int32")[None]

    def last(model, x):
        return jnp.square(run(model, x, where)[0].value[:, -1]).sum()

    slope = nnx.grad(last, argnums=1)(model, x)
    assert (jnp.abs(slope).max(-1) > 0).all()
