"""DSA: an indexer that chooses well, and learns apart from the model."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention.context import Place
from sparsejax.attention.selectors.dsa import divergence
from tests.attention.selecting import (
    CLOSE,
    INDEXER,
    WIDTH,
    T,
    arrays,
    indexer,
    layer,
    positions,
    run,
    selected,
    value,
    with_weights_of,
)


def test_dsa_reads_the_keys_with_the_best_scores(key):
    q, k, _ = arrays(key, b=1)
    mask = np.asarray(selected("dsa", q, k, top=6).to_dense())[0, 0]
    iq, ik, _ = (np.asarray(x) for x in indexer(q, k))
    scores = np.maximum(np.einsum("thc,sc->ths", iq[0], ik[0, :, 0]), 0).sum(1)
    for t in range(T):
        best = np.argsort(-scores[t, : t + 1], kind="stable")[:6]
        assert set(np.flatnonzero(mask[t])) == set(best)


def test_dsa_chooses_the_same_some_queries_at_a_time(key, monkeypatch):
    q, k, _ = arrays(key)
    whole = selected("dsa", q, k)
    module = sys.modules["sparsejax.attention.selectors.dsa"]
    monkeypatch.setattr(module, "CHUNK", 2 * 2 * T * 5)
    found = selected("dsa", q, k)
    np.testing.assert_array_equal(found.to_dense(), whole.to_dense())


def slopes_of_dsa(selection, pick, key):
    """Gradients of a part of the layer's output, by parameter; of its input too."""
    graph, state = nnx.split(layer("dsa", INDEXER | selection))
    x = jax.random.normal(key, (2, T, WIDTH))

    def part(state, x):
        return pick(nnx.merge(graph, state)(x, positions=positions(2))[0])

    by_state, by_x = jax.jit(jax.grad(part, argnums=(0, 1)))(state, x)
    found = {path: v[...] for path, v in nnx.to_flat_state(by_state)}
    return found | {("x",): by_x}


@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_the_indexer_and_the_model_learn_apart(stage, key):
    selection = {"stage": stage, "top": 7}
    loss = slopes_of_dsa(selection, lambda out: out.losses["indexer"], key)
    value = slopes_of_dsa(selection, lambda out: jnp.square(out.value).sum(), key)
    for path in loss:
        assert (jnp.abs(loss[path]).max() > 0) == ("mixer" in path), path
        assert (jnp.abs(value[path]).max() > 0) == ("mixer" not in path), path


@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_the_indexers_loss_is_its_divergence_from_attention(stage, key):
    x = jax.random.normal(key, (1, T, WIDTH))
    model = layer("dsa", INDEXER | {"stage": stage, "top": T, "loss_weight": 2.0})
    found = run(model, x, positions(1))[0].losses["indexer"]
    q, k, *_ = model._project(x, positions(1), None, None)
    iq, weights = model.mixer.queries(x, positions(1))
    ik = model.mixer.features(x, positions(1))["indexer_keys"][:, :, 0]
    past = jnp.tril(jnp.ones((T, T), bool))
    logits = jnp.einsum("bthc,bshc->bhts", q, k.repeat(2, axis=2)) * 4**-0.5
    target = jax.nn.softmax(jnp.where(past, logits, -jnp.inf)).mean(1)
    products = jnp.maximum(jnp.einsum("bthc,bsc->bhts", iq, ik), 0)
    scores = jnp.einsum("bth,bhts->bts", weights, products)
    log = jax.nn.log_softmax(jnp.where(past, scores, -1e30))
    known = jnp.log(jnp.where(target > 0, target, 1))
    each = jnp.where(past, target * (known - log), 0)
    np.testing.assert_allclose(found, 2 * each.sum(-1).mean(), rtol=1e-4)


def test_the_indexers_loss_falls_to_zero_where_it_agrees():
    logits = jax.random.normal(jax.random.key(0), (1, 1, 3, 5))
    lse = jax.nn.logsumexp(logits, -1)
    live = jnp.ones((1, 3, 5), bool)
    found = divergence(logits, lse, logits[:, 0] + 3.0, live, Place())
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_warming_up_attends_densely(key):
    x = jax.random.normal(key, (1, T, WIDTH))
    model = layer("dsa", INDEXER | {"stage": "warmup", "top": 1})
    dense = with_weights_of(layer(None), model)
    np.testing.assert_allclose(value(model, x), value(dense, x), **CLOSE)
