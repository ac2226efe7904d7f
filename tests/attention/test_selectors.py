"""Every selector keeps what dense attention promises, and reads less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from sparsejax.attention import (
    METHODS,
    SELECTORS,
    Attention,
    AttentionConfig,
    BlockMask,
    block_sparse_attention,
    causal,
    empty_cache,
    full,
)
from sparsejax.attention.context import Place
from sparsejax.config import ConfigError, FieldError, convert
from tests.attention.selecting import (
    ALL,
    BLOCK,
    CALLS,
    CAUSAL,
    CHOOSING,
    CLOSE,
    DENSE,
    HEADS,
    KV_HEADS,
    ONE,
    SIZES,
    SOME,
    WIDTH,
    T,
    arrays,
    config,
    layer,
    positions,
    run,
    selected,
    value,
    with_weights_of,
)
from tests.slowly import slowly


def test_every_selector_is_tested():
    assert set(SOME) == set(ALL) == set(ONE) == set(METHODS)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CHOOSING)
def test_a_budget_of_everything_is_dense_attention(name, key):
    x = jax.random.normal(key, (2, T, WIDTH))
    dense = {"pattern": "causal" if METHODS[name].causal else "full"}
    dense = layer(None, causal=METHODS[name].causal, **dense)
    found = with_weights_of(layer(name, ALL[name]), dense)
    found = DENSE.get(name, lambda model: model)(found)
    np.testing.assert_allclose(value(found, x), value(dense, x), **CLOSE)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", CHOOSING)
def test_a_smaller_budget_leaves_something_out(name, key):
    x = 3 * jax.random.normal(key, (2, T, WIDTH))
    some, every = layer(name), layer(name, ALL[name])
    assert jnp.abs(value(some, x) - value(every, x)).max() > 1e-3
    densities = [
        run(model, x, positions(2))[0].metrics["density"] for model in (some, every)
    ]
    assert densities[0] < densities[1] <= 1


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_token_never_changes_what_came_before_it(name, key):
    model, x = layer(name), jax.random.normal(key, (2, T, WIDTH))
    before = value(model, x)
    for changed in (0, 7, 8, 23):
        after = value(model, x.at[:, changed].add(1.0))
        np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
        assert (after[:, changed] != before[:, changed]).any()


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_and_decode_equal_the_whole_forward(name, key):
    model, x = layer(name), jax.random.normal(key, (2, T, WIDTH))
    whole = value(model, x)
    cache = empty_cache(model.config, SIZES, 2, 28, dtype="float32")
    parts = []
    for start, stop in [(0, 9), (9, 18)] + [(t, t + 1) for t in range(18, T)]:
        where = positions(2)[:, start:stop]
        out, cache = run(model, x[:, start:stop], where, None, cache)
        parts.append(out.value)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **CLOSE)
    keys = cache.keys.swapaxes(1, 2)[:, :T]
    features = {name: x[:, :T] for name, x in cache.features.items()}
    again = model.mixer.summaries(keys, features)
    complete = model.mixer.stretch(28).number(T)
    kept = {name: x[:, :complete] for name, x in cache.summaries.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), kept, again)


def test_methods_that_sum_up_keep_it_in_front_of_a_cache():
    sums = {
        name
        for name in CAUSAL
        if empty_cache(config(name), SIZES, 1, 8, dtype="float32").summaries
    }
    assert sums == {"moba", "nsa"}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", sorted(set(CAUSAL) & set(CHOOSING)))
def test_a_cache_shorter_than_the_budget_serves(name, key):
    model, x = layer(name, ALL[name]), jax.random.normal(key, (1, 6, WIDTH))
    model = DENSE.get(name, lambda model: model)(model)
    cache = empty_cache(model.config, SIZES, 1, 2 * BLOCK, dtype="float32")
    found, _ = run(model, x, positions(1, 6), None, cache)
    dense = with_weights_of(layer(None), model)
    np.testing.assert_allclose(found.value, value(dense, x), **CLOSE)


@pytest.mark.few(5)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_query_reads_something(name, key):
    x = jax.random.normal(key, (2, T, WIDTH))
    short = x[:, :1] if METHODS[name].causal else x[:, :4]
    for inputs in (x, 0 * x, short):
        model = layer(name) if inputs.shape[1] == T else layer(name, ONE[name])
        model = with_weights_of(model, layer(None))
        assert jnp.isfinite(value(model, inputs)).all()


@pytest.mark.few(5)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_permuting_the_batch_permutes_the_output(name, key):
    model, x = layer(name), jax.random.normal(key, (2, T, WIDTH))
    np.testing.assert_allclose(value(model, x[::-1]), value(model, x)[::-1], **CLOSE)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", CAUSAL)
def test_documents_do_not_learn_of_each_other(name, key):
    model, x = layer(name), jax.random.normal(key, (1, T, WIDTH))
    lengths = [9, 5, 10]
    numbers = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths))[None].astype("int32")
    where = jnp.concatenate([jnp.arange(n) for n in lengths])[None].astype("int32")
    before = value(model, x, where, numbers)
    assert jnp.isfinite(before).all()
    for changed in (slice(0, 9), slice(14, T)):
        after = value(model, x.at[:, changed].add(1.0), where, numbers)
        same = np.ones(T, bool)
        same[changed] = False
        np.testing.assert_array_equal(after[:, same], before[:, same])


def test_nsa_chooses_by_what_its_own_document_compressed(key):
    model, t = layer("nsa"), 3 * T  # so long that there is more than a choice
    x, lengths = jax.random.normal(key, (1, t, WIDTH)), [10, t - 10]
    numbers = jnp.repeat(jnp.arange(1, 3), jnp.array(lengths))[None].astype("int32")
    where = jnp.concatenate([jnp.arange(n) for n in lengths])[None].astype("int32")
    noise = jax.random.normal(jax.random.key(7), (1, 10, WIDTH))
    before = value(model, x, where, numbers)
    after = value(model, x.at[:, :10].add(noise), where, numbers)
    np.testing.assert_array_equal(after[:, 10:], before[:, 10:])


@functools.cache
def slopes(name, implementation=None):
    """Gradients, values and metrics of a layer with everything on."""
    model = layer(name, learned_sinks=True, implementation=implementation)
    graph, state = nnx.split(model)
    x = jax.random.normal(jax.random.key(1), (2, T, WIDTH))
    numbers = (positions(2) // jnp.array([11, 13], dtype="int32")[:, None]) + 1
    numbers = numbers if METHODS[name].causal else None

    def loss(state, x):
        model = nnx.merge(graph, state)
        out, _ = model(x, positions=positions(2), segments=numbers)
        total = jnp.square(out.value).mean() + sum(out.losses.values())
        return total, (out.value, out.metrics)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)


def assert_alike(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **CLOSE)


# Compiling for a mesh takes ten seconds and more: one that has an indexer.
@pytest.mark.parametrize("name", slowly(sorted(METHODS), but={"dsa"}))
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2, "context": 2}], ids=str)
def test_any_mesh_gives_the_values_and_gradients_of_one_device(name, shape):
    expected = slopes(name)
    mesh = jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
    )
    with jax.set_mesh(mesh):
        found = slopes.__wrapped__(name)
    assert_alike(found, expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_gradients_are_those_of_the_reference(name):
    assert_alike(slopes(name), slopes(name, "reference"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_layers_are_built_under_vmap(name):
    def state(key):
        cfg = config(name)
        return nnx.state(Attention(cfg, WIDTH, HEADS, KV_HEADS, rngs=nnx.Rngs(key)))

    stacked = jax.vmap(state)(jax.random.split(jax.random.key(0), 3))
    for path, leaf in nnx.to_flat_state(stacked):
        letters = leaf.get_metadata()["axes"].split()
        assert leaf[...].ndim == 1 + len(letters), path


def test_every_pure_selector_is_called():
    assert set(CALLS) == set(SELECTORS)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_error_is_the_dropped_mass_times_the_distance_of_the_means(name, key):
    q, k, v = arrays(key)
    visible = selected(name, q, k).to_dense()
    rule = causal() if METHODS[name].causal else full()
    every = BlockMask.from_pattern(rule, q_len=T, kv_len=T, block_q=8, block_kv=8)
    attend = jax.jit(block_sparse_attention)
    dense, sparse = attend(q, k, v, every), attend(q, k, v, selected(name, q, k))
    k, v = (x.repeat(2, axis=2) for x in (k, v))
    logits = jnp.einsum("bthc,bshc->bhts", q, k) * 8**-0.5
    weights = jax.nn.softmax(jnp.where(every.to_dense(), logits, -jnp.inf))
    head, tail = jnp.where(visible, weights, 0), jnp.where(visible, 0, weights)
    dropped = tail.sum(-1)
    means = [
        jnp.einsum(
            "bhts,bshc->bthc", w / jnp.maximum(w.sum(-1, keepdims=True), 1e-30), v
        )
        for w in (head, tail)
    ]
    expected = dropped.mT[..., None] * (means[1] - means[0])
    np.testing.assert_allclose(dense - sparse, expected, **CLOSE)
    assert dropped.max() > 0.1


# The heads of MISA's indexer are not alike: with no block behind, the first ones score.
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"misa"}))
def test_permuting_head_groups_permutes_the_mask(name, key):
    q, k, _ = arrays(key)
    mask = selected(name, q, k).to_dense()
    turned = q.reshape(2, T, 2, 2, 8)[:, :, ::-1].reshape(q.shape)
    found = selected(name, turned, k[:, :, ::-1]).to_dense()
    each = jnp.broadcast_to(mask, (2, 4, T, T)).reshape(2, 2, 2, T, T)[:, ::-1]
    found = jnp.broadcast_to(found, (2, 4, T, T))
    np.testing.assert_array_equal(found, each.reshape(2, 4, T, T))


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"dma", "routing"}))
def test_ties_go_to_the_earlier_keys(name):
    q, k = jnp.zeros((1, T, 4, 8)), jnp.zeros((1, T, 2, 8))
    mask = selected(name, q, k)
    again = selected(name, q, k[..., ::-1])
    np.testing.assert_array_equal(mask.to_dense(), again.to_dense())
    last = np.asarray(mask.to_dense())[0, 0, -1]
    assert last[0]
    assert last.any()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_budget_beyond_what_is_there_is_refused(name, key):
    q, k, _ = arrays(key)
    beyond = {"top": 10**6}
    with pytest.raises(ValueError, match=r"top=1000000: there are only \d+"):
        selected(name, q, k, **beyond)
    mask = selected(name, q, k, **beyond, place=Place(cached=True))
    assert jnp.isfinite(mask.count.sum())


@pytest.mark.parametrize("name", CHOOSING)
def test_a_layer_refuses_a_budget_beyond_what_is_there(name):
    model = layer(name, SOME[name] | {"top": 10**6})
    words = r"selection.top=1000000: there are only \d+ .*; choose at most \d+"
    with pytest.raises(ValueError, match=words):
        value(model, jnp.zeros((1, T, WIDTH)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"selector": "mobaa"}, "selector='mobaa': no such name; did you mean 'moba'"),
        ({"selection": {"topp": 3}}, "selection.topp: no such field.*'top'"),
        ({"selection": {"top": 0}}, "selection.top=0: must be at least 1"),
        ({"selection": {"top": 1.5}}, "selection.top=1.5: expected int"),
        ({"selector": None, "selection": {"top": 3}}, "selection=.*set selector"),
        (
            {"pattern": "sliding_window", "arguments": {"window": 5}},
            "pattern='sliding_window': a selector chooses among all",
        ),
    ],
)
def test_a_config_names_what_is_wrong(change, words):
    values = {"selector": "moba"} | change
    with pytest.raises(FieldError, match=words):
        AttentionConfig(**values)
    with pytest.raises(ConfigError, match=f"config.{words}"):
        convert(AttentionConfig, values)


def test_options_have_the_defaults_of_their_papers():
    assert AttentionConfig(selector="moba").options.top == 3


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(CAUSAL)))
def test_a_causal_model_refuses_methods_that_read_the_future(name):
    with pytest.raises(FieldError, match=f"selector='{name}': reads the future"):
        config(name, causal=True)
    numbers = jnp.ones((1, T), "int32")
    with pytest.raises(ValueError, match="do not pack several"):
        value(layer(name), jnp.zeros((1, T, WIDTH)), segments=numbers)
