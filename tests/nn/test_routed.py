"""Models that route: ids and keys reach the routers, and their state moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.config import ConfigError, convert
from sparsejax.nn import GatedConfig, ModelConfig, Transformer
from sparsejax.nn.transformer import before
from sparsejax.nn.upcycle import dropped, upcycled
from sparsejax.train.step import Step
from sparsejax.tree import leaves
from tests.train.toy import VOCABULARY, batch, toy

KEY = jax.random.key(0)


def model_of(**ffn):
    ffn = {"kind": "moe", "experts": 4, "per_token": 1, "hidden": 16} | ffn
    values = {"depth": 2, "width": 16, "heads": 2, "kv_heads": 1, "ffn": ffn}
    values["attention"] = {"block_q": 16, "block_kv": 16}
    config = convert(ModelConfig, values)
    return Transformer(config, 32, rngs=nnx.Rngs(0))


def tokens(seed=0):
    return jax.random.randint(jax.random.key(seed), (2, 16), 0, 32, jnp.int32)


def call(model, ids, **more):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids, **more))(state, ids)


def test_the_id_before_ends_with_its_document():
    ids = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    places = jnp.asarray([[3, 4, 0, 1]], jnp.int32)
    np.testing.assert_array_equal(before(ids, places, None), [[-1, 5, -1, 7]])
    nine = jnp.asarray([9], jnp.int32)
    np.testing.assert_array_equal(before(ids, places, nine), [[9, 5, -1, 7]])


def test_cached_decoding_hashes_the_ids_that_prefill_hashes():
    """Token by token, with the id before, a bigram hash is what it is all at once."""
    model = model_of(router="hash_bigram")
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, ids, previous, caches):
        hidden = nnx.merge(graph, state)(ids, previous=previous, caches=caches)
        return hidden.value, hidden.caches

    ids, caches = tokens(), model.empty_caches(2, 16)
    last, rows = jnp.full(2, -1, jnp.int32), []
    for n in range(6):
        value, caches = step(state, ids[:, n : n + 1], last, caches)
        rows.append(value)
        last = ids[:, n]
    whole = call(model, ids).value[:, :6]
    np.testing.assert_allclose(jnp.concatenate(rows, 1), whole, rtol=2e-4, atol=2e-4)


def test_every_layer_has_its_own_part_of_the_random_key():
    model = model_of(router="noisy_top_k", per_token=2)
    chosen = call(model, tokens(), key=KEY).metrics["moe/evidence/experts"]
    plain = call(model, tokens()).metrics["moe/evidence/experts"]
    assert (chosen != plain).any(axis=(1, 2)).all()
    assert (chosen[0] != chosen[1]).any()


@pytest.mark.slow
def test_a_step_moves_means_by_what_visited_them():
    """In two halves of the batch or at once: evidence is averaged, then used."""
    ffn = {"kind": "moe", "experts": 8, "per_token": 2, "hidden": 16}
    model = {"ffn": ffn | {"router": "k_means"}, "memory": None, "memory_layers": ()}
    settings = {"model": model, "masked": None}
    moved = []
    for accumulate in (1, 2):
        config = toy(**settings, optim={"accumulate": accumulate})
        step = Step(config, VOCABULARY, np.ones(VOCABULARY, np.int32))
        state = jax.jit(step.init)(KEY)
        after, metrics = jax.jit(step.train)(state, jax.tree.map(jnp.asarray, batch()))
        assert not any("evidence" in name for name in metrics)
        moved.append(leaves(after.variables))
    first, second = moved
    start = leaves(state.variables)
    for path in first:
        assert (first[path] != start[path]).any()
        np.testing.assert_allclose(first[path], second[path], rtol=1e-4, atol=1e-5)


def test_a_table_must_know_every_id(tmp_path):
    path = str(tmp_path / "table.npy")
    np.save(path, np.zeros(31, np.int32))
    with pytest.raises(ValueError, match="has 31 ids; must have 32"):
        model_of(router="hash_table", table=path)


def dense_and(**ffn):
    """A dense model, and the config of one with experts in its place."""
    sparse = model_of(per_token=2, **ffn).config
    dense = dataclasses.replace(sparse, ffn=GatedConfig(hidden=16))
    return Transformer(dense, 32, rngs=nnx.Rngs(1)), sparse


def test_an_upcycled_model_begins_as_the_dense_one():
    dense, config = dense_and()
    sparse = upcycled(dense, config, key=KEY)
    a, b = (call(model, tokens()).value for model in (dense, sparse))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_upcycling_keeps_state_that_is_no_parameter():
    attention = {"selector": "routing", "selection": {"clusters": 3, "top": 4}}
    config = dataclasses.replace(
        dense_and()[1], attention=AttentionConfig(**attention, block_q=4, block_kv=4)
    )
    dense = dataclasses.replace(config, ffn=GatedConfig(hidden=16))
    model = Transformer(dense, 32, rngs=nnx.Rngs(1))
    kept, found = (
        leaves(nnx.split(each, nnx.Param, ...)[2])
        for each in (model, upcycled(model, config, key=KEY))
    )
    (name,) = kept
    assert name.endswith("mixer/centroids")
    np.testing.assert_array_equal(found[name], kept[name])


def test_without_renormalisation_upcycling_dips():
    dense, config = dense_and(router_arguments={"renormalize": False})
    sparse = upcycled(dense, config, key=KEY)
    a, b = (call(model, tokens()).value for model in (dense, sparse))
    assert jnp.abs(a - b).max() > 0.1


def test_drop_upcycling_draws_a_share_of_each_experts_channels_again():
    dense, config = dense_and()
    sparse = upcycled(dense, config, key=KEY, drop=0.5)
    old, new = dense.stacks[0].blocks[0].ffn, sparse.stacks[0].blocks[0].moe
    kept = {}
    for name, axis in (("gate", 2), ("up", 2), ("down", 3)):
        same = getattr(new, name)[...] == getattr(old, name)[...][:, None]
        kept[name] = np.asarray(same.all(axis=axis))
        np.testing.assert_array_equal(kept[name], np.asarray(same.any(axis=axis)))
        np.testing.assert_array_equal(kept[name].sum(axis=-1), 8)
        np.testing.assert_array_equal(kept[name], kept["gate"])
    assert (kept["up"][:, 0] != kept["up"][:, 1]).any()


def test_what_is_drawn_again_has_the_mean_and_deviation_of_what_was():
    weights = 3 + 0.5 * jax.random.normal(KEY, (1, 2, 64, 64))
    drawn = dropped(weights, jax.random.key(1), share=1.0, axis=3)
    assert (drawn != weights).all()
    np.testing.assert_allclose(drawn.mean(), 3, atol=0.05)
    np.testing.assert_allclose(drawn.std(), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("ffn", "drop", "message"),
    [({"hidden": 8}, 0.0, "experts of hidden=8.*must be like the feed-forward"),
     ({"activation": "gelu"}, 0.0, "activation='gelu'"),
     ({"shared": 8}, 0.0, "ffn.shared=8: must be 0"),
     ({"hops": 2}, 0.0, "ffn.hops=2: must be 1"),
     ({}, 1.5, "drop=1.5: must be between 0 and 1")],
)  # fmt: skip
def test_what_would_not_begin_as_the_dense_model_is_refused(ffn, drop, message):
    dense, config = dense_and(**ffn)
    with pytest.raises(ConfigError, match=message):
        upcycled(dense, config, key=KEY, drop=drop)


@pytest.mark.parametrize("change", [{"depth": 3}, {"heads": 4}, {"tied": False}])
def test_upcycling_changes_nothing_but_the_feed_forward(change):
    dense, config = dense_and()
    [(name, value)] = change.items()
    with pytest.raises(ConfigError, match=f"model.{name}={value}: must be the dense"):
        upcycled(dense, dataclasses.replace(config, **change), key=KEY)
