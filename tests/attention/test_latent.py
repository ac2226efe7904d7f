"""Latent attention: its twin's values and gradients, a narrow cache, any mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from sparsejax.attention import (
    METHODS,
    Attention,
    AttentionConfig,
    LatentAttention,
    LatentConfig,
    Sizes,
    empty_cache,
)
from sparsejax.attention.rope_scaling import YarnScaling
from sparsejax.config import FieldError
from tests.attention.selecting import ALL, CLOSE, SOME, positions, run
from tests.slowly import slowly

T, WIDTH, HEADS = 24, 16, 2
PLAIN, ROTATED, VALUE, RANK = 4, 6, 8, 14
SIZES = Sizes(WIDTH, HEADS, HEADS, PLAIN + ROTATED)
NARROW = {
    "kv_rank": RANK,
    "plain_width": PLAIN,
    "rotated_width": ROTATED,
    "value_width": VALUE,
}
YARN = YarnScaling(factor=8.0, trained=16, mscale=0.7, mscale_all=1.3)
PACKED = jnp.repeat(jnp.array([1, 2]), jnp.array([9, 15])).astype("int32")
LAYERS = {
    "packed": ({}, {}),
    "all": (
        {"query_rank": 5, "interleaved": True},
        {
            "pattern": "sliding_window",
            "arguments": {"window": 7},
            "qkv_biases": True,
            "out_bias": True,
            "learned_sinks": True,
            "softcap": 4.0,
            "rope_scaling": YARN,
        },
    ),
}


def config(latent=None, **changes):
    sizes = {"block_q": 4, "block_kv": 4}
    return AttentionConfig(
        latent=LatentConfig(**NARROW | (latent or {})), **sizes | changes
    )


def layer(cfg):
    return LatentAttention(cfg, WIDTH, HEADS, HEADS, init_scale=0.5, rngs=nnx.Rngs(0))


def stirred(model):
    """The model with norms, biases and sinks that are not ones and zeros."""
    draw = np.random.default_rng(0).standard_normal
    state = nnx.state(model)
    moved = jax.tree.map(lambda x: x + 0.2 * draw(x.shape).astype("float32"), state)
    nnx.update(model, moved)
    return model


def turned(x, cfg):
    """Rotate [t, c] as complex numbers, a token and a pair at a time."""
    half = x.shape[-1] // 2
    rate = cfg.rope_theta ** (-jnp.arange(half, dtype="float32") / half)
    amplitude = 1.0
    if cfg.rope_scaling is not None:
        rate = cfg.rope_scaling.rates(rate / (2 * math.pi), cfg.rope_theta)
        rate = rate * 2 * math.pi
        grown = [1 + 0.1 * s * math.log(8.0) for s in (0.7, 1.3)]
        amplitude = grown[0] / grown[1]
    both = (x[:, ::2], x[:, 1::2]) if cfg.latent.interleaved else jnp.split(x, 2, 1)
    angle = jnp.arange(len(x), dtype="float32")[:, None] * rate[None]
    turn = jax.lax.complex(amplitude * jnp.cos(angle), amplitude * jnp.sin(angle))
    number = jax.lax.complex(*both) * turn
    return jnp.concatenate([number.real, number.imag], -1)


def twin(params, x, cfg, numbers=None):
    """Every head by itself, every pair of tokens; [t, d] of one sequence."""
    get = lambda name, none=None: params[name][...] if name in params else none  # noqa: E731

    def normed(y, scale):
        square = jnp.square(y).mean(-1, keepdims=True)
        return y / jnp.sqrt(square + cfg.norm_epsilon) * scale[None]

    inner, weight = x, get("query")
    if cfg.latent.query_rank is not None:
        inner = x @ get("query_down") + get("query_down_bias", jnp.zeros(1))[None]
        inner, weight = normed(inner, get("query_norm")), get("query_up")
    low = x @ get("down") + get("down_bias", jnp.zeros(1))[None]
    narrow, key = normed(low[:, :RANK], get("latent_norm")), turned(low[:, RANK:], cfg)
    i, j = np.arange(len(x))[:, None], np.arange(len(x))[None]
    live = (j <= i) & (j > i - cfg.arguments.get("window", len(x)))
    if numbers is not None:
        live &= numbers[:, None] == numbers[None]
    grown = 1.0 if cfg.rope_scaling is None else 1 + 0.1 * 1.3 * math.log(8.0)
    total = get("out_bias", jnp.zeros(1))[None]
    for h in range(HEADS):
        q = inner @ weight[:, h]
        q = jnp.concatenate([q[:, :PLAIN], turned(q[:, PLAIN:], cfg)], 1)
        up = narrow @ get("up")[:, h]
        k = jnp.concatenate([up[:, :PLAIN], key], 1)
        logits = q @ k.T * grown**2 / math.sqrt(PLAIN + ROTATED)
        if cfg.softcap:
            logits = cfg.softcap * jnp.tanh(logits / cfg.softcap)
        weights = jnp.where(live, jnp.exp(logits), 0)
        below = weights.sum(1, keepdims=True)
        if "sinks" in params:
            below = below + jnp.exp(get("sinks")[h])
        total = total + weights / below @ up[:, PLAIN:] @ get("out")[h]
    return total


def both(function, state, x):
    """Values, and gradients of a loss that weighs them unevenly."""

    def loss(state, x):
        out = function(state, x)
        return jnp.sin(3 * out).mean(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)


@functools.cache
def found(name):
    """A layer and its twin, and what each computes of eight sequences."""
    latent, changes = LAYERS[name]
    cfg, numbers = config(latent, **changes), PACKED if name == "packed" else None
    graph, state = nnx.split(stirred(layer(cfg)))
    x = jax.random.normal(jax.random.key(1), (8, T, WIDTH))

    def mine(state, x):
        rows = None if numbers is None else jnp.broadcast_to(numbers[None], (8, T))
        model = nnx.merge(graph, state)
        return model(x, positions=positions(8), segments=rows)[0].value

    def slow(state, x):
        return jax.vmap(lambda row: twin(state, row, cfg, numbers))(x)

    return (mine, state, x), both(mine, state, x), both(slow, state, x)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **CLOSE)


@pytest.mark.parametrize("name", slowly(LAYERS, but={"all"}))
def test_latent_attention_has_the_values_and_gradients_of_heads_taken_one_by_one(name):
    assert_close(*found(name)[1:])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "shape", [{"data": 2, "tensor": 2, "context": 2}, {"data": 8}], ids=str
)
def test_any_mesh_gives_the_values_and_gradients_of_one_device(shape):
    given, expected, _ = found("all")
    mesh = jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
    )
    with jax.set_mesh(mesh):
        assert_close(both(*given), expected)


def decoded(model, x, cuts):
    cache = empty_cache(model.config, SIZES, len(x), 28, dtype=x.dtype)
    parts = []
    for start, stop in cuts:
        where = positions(len(x))[:, start:stop]
        out, cache = run(model, x[:, start:stop], where, None, cache)
        parts.append(out.value)
    assert int(cache.length) == x.shape[1]
    return jnp.concatenate(parts, 1), cache


# The first is longer than what is read as it is cached, the others are shorter.
CUTS = [(0, 16), (16, 20), *((t, t + 1) for t in range(20, T))]


def test_absorb_and_expand_read_a_narrow_cache_as_the_whole_forward_does():
    latent, changes = LAYERS["all"]
    model = stirred(layer(config(latent, **changes)))
    assert [model.absorbs(n) for n in (1, 4, 16)] == [True, True, False]
    (_, _, x), (_, whole), _ = found("all")
    values, cache = decoded(model, x, CUTS)
    np.testing.assert_allclose(values, whole, **CLOSE)
    assert cache.keys.shape == (8, 1, 28, RANK + ROTATED)
    assert cache.values is None


@pytest.mark.slow
def test_heads_cut_over_devices_read_one_cache():
    latent, changes = LAYERS["all"]
    model = stirred(layer(config(latent, **changes)))
    (_, _, x), (_, whole), _ = found("all")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        values, _ = decoded(model, x, CUTS)
    np.testing.assert_allclose(values, whole, **CLOSE)


ABLE = sorted(name for name, method in METHODS.items() if method.latent)


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLE)
def test_a_selector_that_chooses_everything_is_dense(name, key):
    x = jax.random.normal(key, (2, T, WIDTH))
    every, dense = layer(config(selector=name, selection=ALL[name])), layer(config())
    held = dict(nnx.to_flat_state(nnx.state(dense)))
    own = nnx.to_flat_state(nnx.state(every))
    nnx.update(every, nnx.from_flat_state([(p, held.get(p, v)) for p, v in own]))
    values = (run(model, x, positions(2))[0].value for model in (every, dense))
    np.testing.assert_allclose(*values, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLE)
def test_a_selector_chooses_the_same_keys_of_a_cache(name, key):
    model = layer(config(selector=name, selection=SOME[name]))
    x = jax.random.normal(key, (2, T, WIDTH))
    whole = run(model, x, positions(2))[0].value
    values, _ = decoded(model, x, [(0, 16), (16, 20), (20, T)])
    np.testing.assert_allclose(values, whole, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_an_indexer_follows_the_logits_that_attention_has(stage, key):
    # What multiplies the logits may as well multiply the queries.
    given = {"selector": "dsa", "selection": SOME["dsa"] | {"stage": stage}}
    same = YarnScaling(factor=8.0, trained=16, gain=YARN.amplitude)
    one, other = (layer(config(**given, rope_scaling=x)) for x in (YARN, same))
    other.query[...] = other.query[...] * YARN.logit_gain
    x = jax.random.normal(key, (1, T, WIDTH))
    found, expected = (run(model, x, positions(1))[0] for model in (one, other))
    np.testing.assert_allclose(found.value, expected.value, **CLOSE)
    assert found.losses["indexer"] > 0.1
    np.testing.assert_allclose(
        found.losses["indexer"], expected.losses["indexer"], **CLOSE
    )


@pytest.mark.parametrize(
    ("latent", "changes", "words"),
    [
        ({"kv_rank": 0}, {}, "kv_rank=0: must be positive"),
        ({"query_rank": 0}, {}, "query_rank=0: must be positive; or none"),
        ({"rotated_width": 3}, {}, "rotated_width=3: must be even"),
        ({}, {"head_width": 8}, "head_width=8: is plain_width [+] rotated_width"),
        ({}, {"key_conv": 3}, "key_conv=3: convolves .* set it to 0"),
        ({}, {"qk_norm_over": "heads"}, "qk_norm_over='heads': .* leave it 'head'"),
    ],
)
def test_a_config_names_what_latent_attention_cannot_have(latent, changes, words):
    with pytest.raises(FieldError, match=words):
        config(latent, **changes)


@pytest.mark.parametrize("name", sorted({*METHODS} - {*ABLE}))
def test_a_selector_that_needs_keys_of_heads_is_refused(name):
    words = f"selector='{name}': .* take dsa, misa, moba, or none"
    with pytest.raises(FieldError, match=words):
        config(selector=name, causal=False)


def test_a_growth_of_all_logits_is_for_latent_attention():
    with pytest.raises(FieldError, match=r"rope_scaling=.*set latent, or no mscale"):
        AttentionConfig(rope_scaling=YARN)


def test_each_layer_refuses_the_others_config():
    with pytest.raises(ValueError, match="build a LatentAttention"):
        Attention(config(), WIDTH, HEADS, HEADS, rngs=nnx.Rngs(0))
    for cfg, kv_heads in ((AttentionConfig(), HEADS), (config(), 1)):
        with pytest.raises(ValueError, match=f"kv_heads={kv_heads}: .* kv_heads=2"):
            LatentAttention(cfg, WIDTH, HEADS, kv_heads, rngs=nnx.Rngs(0))
