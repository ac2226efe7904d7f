"""The attention layer: causal, packed, cached and sharded alike, and hard to misuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from sparsejax.attention import PATTERNS, Attention, AttentionConfig, Cache
from sparsejax.config import ConfigError, FieldError, convert
from tests.attention.test_patterns import EXAMPLES, NONCAUSAL

T = 24
CAUSAL = sorted(set(PATTERNS) - NONCAUSAL)
CLOSE = {"rtol": 2e-5, "atol": 5e-6}  # float32, sums over some hundred products


def config(pattern="sliding_window", **changes):
    given = {"pattern": pattern, "arguments": EXAMPLES[pattern]}
    return AttentionConfig(**given | {"block_q": 4, "block_kv": 8} | changes)


def layer(cfg):
    return Attention(cfg, 16, 4, 2, init_scale=0.5, rngs=nnx.Rngs(0))


def positions(b, t=T):
    return jnp.broadcast_to(jnp.arange(t, dtype="int32")[None], (b, t))


@nnx.jit
def run(model, x, positions, segments=None, cache=None):
    out, cache = model(x, positions=positions, segments=segments, cache=cache)
    return out.value, cache


@pytest.mark.few(2)
@pytest.mark.parametrize("pattern", CAUSAL)
def test_a_token_never_changes_what_came_before_it(pattern, key):
    model, x = layer(config(pattern)), jax.random.normal(key, (1, T, 16))
    before, _ = run(model, x, positions(1))
    for changed in (0, 7, 8, 23):
        after, _ = run(model, x.at[:, changed].add(1.0), positions(1))
        np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
        assert (after[:, changed] != before[:, changed]).any()


@pytest.mark.few(2)
@pytest.mark.parametrize("pattern", CAUSAL)
def test_cached_prefill_and_decode_equal_the_whole_forward(pattern, key):
    model = layer(config(pattern, softcap=5.0, learned_sinks=True))
    x = jax.random.normal(key, (2, T, 16))
    whole, _ = run(model, x, positions(2))
    cache = Cache.empty(2, 27, 2, 4, dtype="float32")
    parts = []
    for start, stop in [(0, 5), (5, 18)] + [(t, t + 1) for t in range(18, T)]:
        where = positions(2)[:, start:stop]
        out, cache = run(model, x[:, start:stop], where, None, cache)
        parts.append(out)
    assert int(cache.length) == T
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **CLOSE)


def test_decoding_compiles_once(key):
    model, x = layer(config()), jax.random.normal(key, (1, 1, 16))
    graph, state = nnx.split(model)
    traced = []

    @jax.jit
    def step(state, cache):
        traced.append(1)
        where = cache.length[None, None]
        return nnx.merge(graph, state)(x, positions=where, cache=cache)[1]

    cache = Cache.empty(1, 8, 2, 4, dtype="float32")
    for _ in range(8):
        cache = step(state, cache)
    assert len(traced) == 1


def test_packed_documents_equal_documents_alone(key):
    model, x = layer(config()), jax.random.normal(key, (1, T, 16))
    cuts = [slice(0, 9), slice(9, 14), slice(14, T)]
    numbers = jnp.repeat(jnp.array([1, 2, 3]), jnp.array([9, 5, 10]))[None]
    where = jnp.concatenate([jnp.arange(c.stop - c.start) for c in cuts])[None]
    packed, _ = run(model, x, where.astype("int32"), numbers.astype("int32"))
    for cut in cuts:
        alone, _ = run(model, x[:, cut], positions(1, cut.stop - cut.start))
        np.testing.assert_allclose(packed[:, cut], alone, **CLOSE)


def test_a_window_as_long_as_the_text_is_causal_attention(key):
    x = jax.random.normal(key, (2, T, 16))
    window = layer(config(arguments={"window": T}))
    found, _ = run(window, x, positions(2))
    expected, _ = run(layer(config("causal")), x, positions(2))
    np.testing.assert_allclose(found, expected, **CLOSE)


MESHES = [
    {"data": 8},
    {"data": 2, "tensor": 2},
    {"context": 2},
    {"data": 2, "tensor": 2, "context": 2},
]


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_any_mesh_gives_the_values_and_gradients_of_one_device(shape, key):
    cfg = config(arguments={"window": 7}, learned_sinks=True)
    graph, state = nnx.split(layer(cfg))
    x = jax.random.normal(key, (8, T, 16))
    numbers = (positions(8) // jnp.arange(5, 13, dtype="int32")[:, None]) + 1

    def loss(state, x):
        model = nnx.merge(graph, state)
        out, _ = model(x, positions=positions(8), segments=numbers)
        return jnp.square(out.value).mean(), out.value

    expected = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    count = int(np.prod(list(shape.values())))
    mesh = jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[:count],
    )
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **CLOSE)


def test_context_devices_need_whole_blocks():
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    model, x = layer(config(block_q=8)), jnp.zeros((1, T, 16))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"24 .* 8 .* 2 context"):
        model(x, positions=positions(1))


def test_layers_are_built_under_vmap():
    cfg = config(learned_sinks=True)

    def state(key):
        made = Attention(cfg, 16, 4, 2, init_scale=0.5, rngs=nnx.Rngs(key))
        return nnx.state(made)

    stacked = jax.vmap(state)(jax.random.split(jax.random.key(0), 3))
    axes = {path[0]: leaf.get_metadata()["axes"] for path, leaf in _variables(stacked)}
    assert axes == {
        "query": "d h c",
        "key": "d g c",
        "value": "d g c",
        "out": "h c d",
        "query_norm": "c",
        "key_norm": "c",
        "sinks": "h",
    }
    assert stacked["query"][...].shape == (3, 16, 4, 4)


def _variables(state):
    return nnx.to_flat_state(state)


def test_init_scale_scales_the_output_only(key):
    cfg, x = config(), jax.random.normal(key, (1, T, 16))
    one, half = (
        Attention(cfg, 16, 4, 2, init_scale=s, rngs=nnx.Rngs(0)) for s in (1.0, 0.5)
    )
    found, expected = run(half, x, positions(1))[0], run(one, x, positions(1))[0]
    np.testing.assert_allclose(2 * found, expected, **CLOSE)


def test_bfloat16_stays_bfloat16(key):
    x = jax.random.normal(key, (1, T, 16))
    exact, _ = run(layer(config()), x, positions(1))
    rough, _ = run(layer(config()), x.astype("bfloat16"), positions(1))
    assert rough.dtype == "bfloat16"
    # A handful of roundings to 8 bits of values about 1.
    np.testing.assert_allclose(rough.astype("float32"), exact, atol=0.05)


def test_an_overflowing_cache_is_refused_or_poisoned():
    model, x = layer(config()), jnp.zeros((1, 3, 16))
    cache = Cache.empty(1, 8, 2, 4, dtype="float32")._replace(length=jnp.int32(6))
    with pytest.raises(ValueError, match=r"6 cached and 3 new .* capacity of 8"):
        model(x, positions=positions(1, 3), cache=cache)
    out, _ = run(model, x, positions(1, 3), None, cache)
    assert jnp.isnan(out).all()


def test_a_cache_refuses_segments_and_patterns_that_read_the_future():
    cache = Cache.empty(1, 8, 2, 4, dtype="float32")
    x, where = jnp.zeros((1, 3, 16)), positions(1, 3)
    with pytest.raises(ValueError, match="cache and segments exclude"):
        layer(config())(x, positions=where, segments=where, cache=cache)
    with pytest.raises(ValueError, match="'full' reads the future"):
        layer(config("full", causal=False))(x, positions=where, cache=cache)


@pytest.mark.parametrize("pattern", sorted(NONCAUSAL))
def test_a_causal_model_refuses_patterns_that_read_the_future(pattern):
    with pytest.raises(FieldError, match=f"pattern='{pattern}': reads the future"):
        config(pattern)
    assert not config(pattern, causal=False).build().is_causal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pattern": "slidng_window"}, "did you mean 'sliding_window'"),
        ({"arguments": {}}, "sliding_window needs window"),
        ({"arguments": {"windw": 4}}, "arguments.windw=4.*did you mean 'window'"),
        ({"arguments": {"window": 0}}, "arguments=.*window=0"),
        ({"pattern": "causal"}, "arguments.window=5: causal takes no such"),
        ({"block_q": 0}, "block_q=0: must be positive"),
        ({"head_width": 7}, "head_width=7: must be even"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"dense_every": -1}, "dense_every=-1"),
        ({"implementation": "xlaa"}, "did you mean 'xla'"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
    ],
)
def test_a_config_names_what_is_wrong(change, words):
    values = {"pattern": "sliding_window", "arguments": {"window": 5}} | change
    with pytest.raises(FieldError, match=words):
        AttentionConfig(**values)
    with pytest.raises(ConfigError, match="config"):
        convert(AttentionConfig, values)


def test_equal_configs_hash_equally():
    assert hash(config()) == hash(config())
    assert config() != config(arguments={"window": 9})


def test_heads_must_group():
    with pytest.raises(ValueError, match="heads=4: must be a multiple of kv_heads=3"):
        Attention(config(), 16, 4, 3, init_scale=1.0, rngs=nnx.Rngs(0))
