"""Queries normed over the batch: its own moments in training, running ones after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import memory
from sparsejax.config import FieldError
from sparsejax.tree import leaves
from tests.memory.test_layer import SHAPE, SMALL, WIDTH, build, call, tokens
from tests.train import toy

BATCH = {"sub_keys": 4, "heads": 2, "per_head": 16, "key_width": 8}
CONFIGS = {
    "product_key": memory.MemoryConfig(**BATCH, query_norm="batch"),
    "peer": memory.PEERConfig(**BATCH, query_norm="batch"),
    "memory_plus": memory.MemoryPlusConfig(**BATCH, query_norm="batch"),
}
PAD = np.arange(SHAPE[1])[None] < np.array([[4], [3], [1], [0]])  # real tokens
every_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


run = jax.jit(call, static_argnums=0)


def sums(graph, state, x):
    """Of the real tokens' queries, one by one, of their squares, and their number."""
    weight = np.asarray(nnx.merge(graph, state)[0].lookup.query[...])
    real = np.asarray(x)[PAD]
    queries = np.einsum("nd,dhc->nhc", real, weight)
    parts = queries, np.square(queries), np.ones_like(queries)
    return np.stack([part.sum(axis=0) for part in parts])


@every_kind
def test_training_norms_by_the_batch_and_evaluation_by_what_runs(config, key):
    graph, state = build(config)
    x = 3 * tokens(key) + 1
    about = {"valid": jnp.asarray(PAD)}
    training = run(graph, state, x, **about, key=jax.random.key(0))
    seen = sums(graph, state, x)
    found = training.metrics["evidence/queries"]
    np.testing.assert_allclose(found, seen, rtol=2e-5, atol=1e-5)
    evaluated = run(graph, state, x, **about)
    assert "evidence/queries" not in evaluated.metrics
    assert (evaluated.value != training.value).any()
    layer, pool = nnx.merge(graph, state)
    layer.lookup.moments[...] = found[:2] / found[2:]
    after = run(*nnx.split((layer, pool)), x, **about)
    np.testing.assert_allclose(after.value, training.value, rtol=2e-5, atol=2e-6)


@every_kind
def test_moments_that_rest_norm_in_training_too(config, key):
    graph, state = build(config)
    x, about = 3 * tokens(key) + 1, {"valid": jnp.asarray(PAD)}
    evaluated = run(graph, state, x, **about)
    layer, pool = nnx.merge(graph, state)
    memory.rest_moments(layer)
    training = run(*nnx.split((layer, pool)), x, **about, key=jax.random.key(0))
    assert "evidence/queries" not in training.metrics
    np.testing.assert_array_equal(training.value, evaluated.value)


@every_kind
def test_padding_and_the_size_of_queries_say_nothing(config, key):
    graph, state = build(config)
    x, about = tokens(key), {"valid": jnp.asarray(PAD), "key": jax.random.key(0)}
    dirty = jnp.where(PAD[..., None], x, 1e3)
    layer, pool = nnx.merge(graph, state, copy=True)
    layer.lookup.query[...] *= 100
    _, large = nnx.split((layer, pool))
    plain, padded = (run(graph, state, a, **about).value for a in (x, dirty))
    np.testing.assert_array_equal(plain[PAD], padded[PAD])
    scaled = run(graph, large, x, **about).value
    np.testing.assert_allclose(scaled[PAD], plain[PAD], rtol=1e-2, atol=1e-3)


def test_gradients_go_through_the_moments_and_not_to_the_running_ones(key):
    """Along the query's own length there is none: the norm takes it out."""
    layer = memory.PEER(CONFIGS["peer"], WIDTH, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def slope(params):
        def loss(params):
            layer = nnx.merge(graph, params, rest)
            return jnp.sin(layer(5 * tokens(key), key=key).value).sum()

        return jax.grad(loss)(params)

    found, known = leaves(slope(params)), leaves(params)
    assert "lookup/moments" not in found
    along = (found["lookup/query"] * known["lookup/query"]).sum()
    across = jnp.abs(found["lookup/query"]).sum()
    assert float(across) > 1e-3
    assert abs(float(along)) < 1e-3 * float(across)


def test_running_moments_become_those_of_all_batches():
    """Their variance is of all queries: of every batch, and between batches."""
    queries = np.random.default_rng(0).normal(2, 3, (200, 5, 2, 8))
    moments = jnp.zeros((2, 2, 8)).at[1].set(1)
    parts = queries, np.square(queries), np.ones_like(queries)
    batch = np.stack([part.mean(axis=0).sum(axis=0) for part in parts])
    for _ in range(200):
        moments = memory.moved_moments(moments, jnp.asarray(batch, "float32"))
    mean, square = np.asarray(moments)
    np.testing.assert_allclose(mean, queries.mean(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(square - mean**2, queries.var(axis=(0, 1)), rtol=1e-3)
    nothing = memory.moved_moments(moments, jnp.zeros((3, 2, 8)))
    np.testing.assert_array_equal(nothing, moments)


def test_other_norms_have_no_moments():
    layer = memory.ProductKeyMemory(
        memory.MemoryConfig(**SMALL), WIDTH, rngs=nnx.Rngs(0)
    )
    assert not jax.tree.leaves(nnx.state(layer, memory.QueryMoments))


def test_a_norm_that_the_next_one_undoes_is_refused():
    with pytest.raises(FieldError, match="query_norm='rms': would change nothing"):
        memory.MemoryPlusConfig(**SMALL, query_norm="rms")
    memory.MemoryPlusConfig(**SMALL, query_norm="rms", qk_norm="none")


@pytest.mark.slow  # three programs to compile
def test_running_moments_follow_the_batches_on_every_mesh_alike():
    mesh = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
    model = toy.TOY["model"]
    model = {**model, "memory": {**model["memory"], "query_norm": "batch"}}

    def after(steps, devices=None, **changes):
        config = toy.toy(model=model, masked=None, **changes)
        _, state, train, _, mesh = toy.start(config, devices)
        with jax.set_mesh(mesh):
            for index in range(steps):
                state, metrics = train(state, toy.batch(index))
                assert not [name for name in metrics if "evidence" in name]
        return {k: np.array(x) for k, x in leaves(state.variables).items()}

    start, one, three = (after(n, toy.one_device()) for n in (0, 1, 3))
    (name,) = [name for name in start if name.endswith("lookup/moments")]
    assert start[name].shape == (1, 2, 2, 8)
    np.testing.assert_array_equal(start[name][0, 0], 0)
    np.testing.assert_array_equal(start[name][0, 1], 1)
    assert (one[name] != start[name]).all()
    np.testing.assert_allclose(after(3, mesh=mesh)[name], three[name], atol=2e-5)
    parts = after(1, toy.one_device(), optim={"accumulate": 2})
    np.testing.assert_allclose(parts[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_spread_that_is_small_beside_the_mean_is_seen():
    layer = memory.PEER(CONFIGS["peer"], WIDTH, rngs=nnx.Rngs(0))
    layer.lookup.query[...] = jnp.ones_like(layer.lookup.query[...])
    x = 10 + 1e-2 * jax.random.normal(jax.random.key(0), (64, WIDTH))
    (_, variance), _ = layer.lookup.moments_of(x, None)
    queries = np.float64(x).sum(axis=-1)
    np.testing.assert_allclose(variance, queries.var(), rtol=1e-2)
