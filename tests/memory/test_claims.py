"""What each memory is in its limits: a table, an attention, an MLP."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import memory
from sparsejax.config import ConfigError, convert
from sparsejax.memory import tree
from sparsejax.memory.layer import normalize
from sparsejax.memory.peer import single_neurons
from sparsejax.memory.usage import usage

WIDTH = 12
SMALL = {"sub_keys": 4, "heads": 2, "per_head": 5, "key_width": 8}
PATHS = {name: jax.jit(path) for name, path in tree.PATHS.items()}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tokens(key):
    return jax.random.normal(key, (2, 3, WIDTH))


@partial(jax.jit, static_argnums=0)
def merged(graph, state, *operands):
    return nnx.merge(graph, state)(*operands)


def run(layer, *operands):
    """Call a layer, compiled as one program."""
    return merged(*nnx.split(layer), *operands)


def full_keys(keys):
    """Both sub-keys of all slots: ``[h, r * r, c]``."""
    r = keys.shape[2]
    halves = [jnp.repeat(keys[:, 0], r, axis=1), jnp.tile(keys[:, 1], (1, r, 1))]
    return jnp.concatenate(halves, -1)


def dense_memory(layer, x):
    """Attention of every head over all slots."""
    query = jnp.einsum("btd,dhc->bthc", x, layer.lookup.query[...])
    query = normalize(query, layer.config.query_norm)
    scores = jnp.einsum("bthc,hmc->bthm", query, full_keys(layer.lookup.keys[...]))
    return jnp.einsum("bthm,md->btd", jax.nn.softmax(scores), layer.values[...])


def test_memory_that_reads_all_slots_is_dense_attention_with_its_gradients(key):
    config = memory.MemoryConfig(**SMALL | {"per_head": 16})
    graph, state = nnx.split(memory.ProductKeyMemory(config, WIDTH, rngs=nnx.Rngs(0)))

    def value(layer, x):
        return layer(x).value

    def slopes(function):
        def loss(state, x):
            return jnp.sum(jnp.sin(function(nnx.merge(graph, state), x)))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, tokens(key))

    same = lambda a, b: np.testing.assert_allclose(a, b, **CLOSE)  # noqa: E731
    jax.tree.map(same, slopes(value), slopes(dense_memory))


def test_memory_of_one_slot_gives_its_value_once_for_every_head(key):
    config = memory.MemoryConfig(sub_keys=1, heads=3, per_head=1, key_width=4)
    layer = memory.ProductKeyMemory(config, WIDTH, rngs=nnx.Rngs(0))
    y = run(layer, tokens(key)).value
    expected = np.broadcast_to(3 * layer.values[0], y.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_permuted_slots_give_the_same_output(key):
    layer = memory.ProductKeyMemory(
        memory.MemoryConfig(**SMALL), WIDTH, rngs=nnx.Rngs(0)
    )
    before = run(layer, tokens(key)).value
    rows, columns = np.array([2, 0, 3, 1]), np.array([1, 3, 0, 2])
    keys = layer.lookup.keys[...]
    moved = jnp.stack([keys[:, 0][:, rows], keys[:, 1][:, columns]], 1)
    layer.lookup.keys[...] = moved
    values = layer.values[...].reshape(4, 4, WIDTH)[rows][:, columns]
    layer.values[...] = values.reshape(16, WIDTH)
    np.testing.assert_allclose(run(layer, tokens(key)).value, before, **CLOSE)


def test_values_that_nothing_read_have_exactly_zero_gradient(key):
    config = memory.MemoryConfig(**SMALL | {"sub_keys": 16, "per_head": 2})
    layer = memory.ProductKeyMemory(config, WIDTH, rngs=nnx.Rngs(0))

    graph, state = nnx.split(layer)

    @partial(jax.grad, has_aux=True)
    def slopes_of(state):
        out = nnx.merge(graph, state)(tokens(key))
        return out.value.sum(), out.metrics

    slopes, metrics = jax.jit(slopes_of)(state)
    touched = (np.asarray(slopes["values"][...]) != 0).any(-1)
    assert 0 < touched.sum() <= 6 * 2 * 2
    assert touched.mean() == metrics["usage"]


def test_shared_pool_has_the_sum_of_its_layers_gradients(key):
    config = memory.MemoryPlusConfig(**SMALL)
    first, second = (
        memory.MemoryPlus(config, WIDTH, rngs=nnx.Rngs(seed)) for seed in (0, 1)
    )
    pool = memory.ValuePool(config, WIDTH, rngs=nnx.Rngs(2)).values[...]
    x = tokens(key)

    def slope(*layers):
        def loss(pool):
            return sum(layer(x, pool).value.sum() for layer in layers)

        return jax.jit(jax.grad(loss))(pool)

    np.testing.assert_allclose(
        slope(first, second), slope(first) + slope(second), **CLOSE
    )


def test_one_head_that_reads_one_slot_is_a_plain_table_lookup(key):
    config = memory.MemoryPlusConfig(
        **SMALL | {"heads": 1, "per_head": 1}, gate="none", value_width=WIDTH
    )
    layer = memory.MemoryPlus(config, WIDTH, rngs=nnx.Rngs(0))
    pool = jnp.arange(16.0)[:, None] * jnp.ones((16, WIDTH))
    y = np.asarray(run(layer, tokens(key), pool).value)
    assert np.isin(y, range(16)).all()
    assert (y == y[..., :1]).all()


def test_normalised_scores_stay_below_the_key_width(key):
    config = memory.MemoryPlusConfig(**SMALL)
    layer = memory.MemoryPlus(config, WIDTH, rngs=nnx.Rngs(0))
    gain = jnp.ones(config.heads)
    rows = 1e3 * tokens(key).reshape(-1, WIDTH)
    layer.lookup.keys[...] = layer.lookup.keys[...] * 100
    scores = layer.lookup(rows, k=16, norm="none", gain=gain).scores
    assert 1 < np.abs(scores).max() <= config.key_width


def test_pool_of_another_size_is_refused(key):
    layer = memory.MemoryPlus(memory.MemoryPlusConfig(**SMALL), WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"pool of 9 slots: must have .* = 16; build"):
        layer(tokens(key), jnp.zeros((9, WIDTH)))


def test_all_single_neurons_with_weight_one_are_a_dense_layer(key):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (5, WIDTH))
    down, up = (jax.random.normal(k, (16, WIDTH)) for k in keys[1:])
    ids = jnp.tile(jnp.arange(16), (5, 1))
    y = single_neurons(x, down, up, ids, jnp.ones((5, 16)), activation="gelu")
    np.testing.assert_allclose(y, jax.nn.gelu(x @ down.T) @ up, rtol=1e-5, atol=1e-4)


def test_neuron_that_two_heads_retrieve_counts_twice(key):
    x, down, up = jax.random.normal(key, (3, 1, WIDTH))
    once = single_neurons(x, down, up, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))
    twice = single_neurons(x, down, up, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_peer_with_flat_sigmoid_scores_is_half_a_dense_layer(key):
    config = memory.PEERConfig(
        **SMALL | {"per_head": 16, "heads": 1}, scores="sigmoid", activation="relu"
    )
    layer = memory.PEER(config, WIDTH, rngs=nnx.Rngs(0))
    layer.lookup.keys[...] = jnp.zeros_like(layer.lookup.keys[...])
    x = tokens(key)
    dense = jax.nn.relu(x @ layer.down[...].T) @ layer.up[...]
    np.testing.assert_allclose(run(layer, x).value, dense / 2, **CLOSE)


def random_tree(key, depth, width=3):
    """A tree with biases everywhere."""
    leaves = 2**depth
    shapes = [
        (leaves - 1, WIDTH),
        (leaves - 1,),
        (leaves * width, WIDTH),
        (leaves * width,),
        (leaves * width, WIDTH),
        (leaves, WIDTH),
    ]
    keys = jax.random.split(key, len(shapes))
    return tree.Tree(*map(jax.random.normal, keys, shapes))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_leaf_weights_sum_to_one(depth, key):
    weights = tree.leaf_weights(3 * jax.random.normal(key, (7, 2**depth - 1)))
    assert weights.shape == (7, 2**depth)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("path", ["soft", "hard"])
def test_tree_without_decisions_is_a_dense_layer(path, key):
    one, x = random_tree(key, 0), tokens(key).reshape(-1, WIDTH)
    dense = jax.nn.relu(x @ one.down.T + one.down_bias[None]) @ one.up + one.up_bias
    np.testing.assert_allclose(PATHS[path](x, one).value, dense, **CLOSE)


@pytest.mark.parametrize("depth", [1, 3])
def test_certain_decisions_make_both_paths_agree(depth, key):
    x = jax.random.normal(key, (20, WIDTH))
    shy = random_tree(jax.random.fold_in(key, 1), depth)
    sure = shy._replace(node=1e4 * shy.node, node_bias=1e4 * shy.node_bias)
    soft, hard = PATHS["soft"](x, sure), PATHS["hard"](x, sure)
    np.testing.assert_array_equal(soft.leaf, hard.leaf)
    np.testing.assert_allclose(soft.value, hard.value, rtol=1e-4, atol=1e-4)
    assert np.abs(PATHS["soft"](x, shy).value - hard.value).max() > 0.1
    np.testing.assert_allclose(soft.leaf_entropy, 0, atol=1e-6)
    np.testing.assert_allclose(soft.node_entropy, 0, atol=1e-6)


def test_undecided_tree_has_the_entropy_of_fair_coins(key):
    x = jnp.zeros((2, WIDTH))
    fair = random_tree(key, 3)
    fair = fair._replace(node_bias=jnp.zeros(7))
    answer = PATHS["soft"](x, fair)
    np.testing.assert_allclose(answer.node_entropy, 7 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(answer.leaf_entropy, 3 * np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(answer.leaf, 7)  # a logit of zero is a yes


def test_hard_path_reads_one_leaf_and_the_nodes_above_it(key):
    x = jnp.ones((1, WIDTH))
    whole = random_tree(key, 3)
    leaf = int(PATHS["hard"](x, whole).leaf[0])
    node, above = leaf + 7, []
    while node:
        node = (node - 1) // 2
        above.append(node)
    others = np.setdiff1d(range(7), above)
    rows = np.delete(np.arange(24), np.s_[3 * leaf : 3 * leaf + 3])
    poisoned = whole._replace(
        node=whole.node.at[others].set(jnp.nan),
        down=whole.down.at[rows].set(jnp.nan),
        up=whole.up.at[rows].set(jnp.nan),
    )
    y = PATHS["hard"](x, poisoned).value
    np.testing.assert_array_equal(y, PATHS["hard"](x, whole).value)


def test_hardening_is_a_loss_of_the_soft_path_only(key):
    config = memory.FastFeedForwardConfig(depth=2, leaf_width=3, hardening=2.0)
    layer = memory.FastFeedForward(config, WIDTH, rngs=nnx.Rngs(0))
    soft = run(layer, tokens(key)).losses["hardening"]
    layer.config = replace(config, path="hard")
    assert 0 < soft <= 2.0 * 3 * np.log(2)
    assert run(layer, tokens(key)).losses["hardening"] == 0


@pytest.mark.parametrize(
    ("ids", "weights", "expected"),
    [
        ([[0, 1], [2, 3]], [[0.5, 0.5], [0.5, 0.5]], (1.0, 0.0, np.log(2))),
        ([[1, 2], [1, 0]], [[1.0, 0.0], [1.0, 0.0]], (0.25, np.log(4), 0.0)),
        ([[1, 1], [1, 1]], [[0.0, 0.0], [0.0, 0.0]], (0.0, np.log(4), 0.0)),
    ],
    ids=["even", "one slot", "none"],
)
def test_usage_of_known_reads(ids, weights, expected):
    ids, weights = jnp.array(ids)[:, None], jnp.array(weights)[:, None]
    found = jax.jit(partial(usage, slots=4))(ids, weights)
    values = [found[name] for name in ("usage", "usage_kl", "entropy")]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    np.testing.assert_allclose(found["dead"], 1 - found["usage"])


def test_slots_are_counted_where_they_are_read_by_tokens_that_count():
    ids = jnp.array([[[1, 2], [1, 0]], [[3, 3], [2, 1]]])
    weights = jnp.array([[[0.5, 0.5], [1.0, 0.0]], [[0.1, 0.9], [0.0, 1.0]]])
    found = memory.slot_counts(ids, weights, slots=5)
    assert found.tolist() == [0, 3, 1, 2, 0]
    valid = jnp.array([[True, False]])
    found = memory.slot_counts(ids, weights, slots=5, valid=valid)
    assert found.tolist() == [0, 2, 1, 0, 0]


def test_a_tree_can_be_trained_softly_and_evaluated_by_one_leaf(key):
    config = memory.FastFeedForwardConfig(depth=2, leaf_width=3, inference="hard")
    layer = memory.FastFeedForward(config, WIDTH, rngs=nnx.Rngs(0))

    def values(**changes):
        layer.config = replace(config, **changes)
        return run(layer, tokens(key)).value

    soft, hard = values(inference=None), values(inference=None, path="hard")
    assert (soft != hard).any()
    np.testing.assert_array_equal(values(), hard)
    layer.config = config
    training = layer(tokens(key), key=jax.random.key(0)).value
    np.testing.assert_allclose(training, soft, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (memory.MemoryConfig, {"sub_keys": 0}, "sub_keys=0: must be at least 1"),
        (memory.MemoryConfig, {"sub_keys": 46341}, "sub_keys=46341: .* int32"),
        (memory.MemoryConfig, {"sub_keys": 4}, r"per_head=32: must be in 1\.\.16"),
        (memory.PEERConfig, {"sub_keys": 9, "key_width": 7}, "key_width=7: .* even"),
        (memory.PEERConfig, {"sub_keys": 9, "heads": 0}, "heads=0: must be at least"),
        (memory.PEERConfig, {"sub_keys": 9, "scores": "max"}, "scores='max': expected"),
        (
            memory.PEERConfig,
            {"sub_keys": 9, "implementation": "mosaic"},
            "implementation='mosaic': .*did you mean 'mosaic_tpu'",
        ),
        (
            memory.MemoryPlusConfig,
            {"sub_keys": 9, "value_width": 0},
            "value_width=0: must be at least 1",
        ),
        (
            memory.FastFeedForwardConfig,
            {"depth": 0, "leaf_width": 4},
            r"depth=0: must be in 1\.\.24; without",
        ),
        (
            memory.FastFeedForwardConfig,
            {"depth": 24, "leaf_width": 999},
            "leaf_width=999: .* int32",
        ),
        (
            memory.FastFeedForwardConfig,
            {"depth": 2, "leaf_width": 0},
            "leaf_width=0: must be at least",
        ),
        (
            memory.FastFeedForwardConfig,
            {"depth": 2, "leaf_width": 1, "hardening": -1.0},
            r"hardening=-1\.0: must not be negative",
        ),
    ],
)
def test_config_names_the_fault(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        convert(kind, values)
