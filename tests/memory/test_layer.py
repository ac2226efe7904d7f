"""One suite for all memory layers, and the claim of each."""

from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import memory
from sparsejax.memory import MEMORIES, tiles
from sparsejax.partition import MESH_AXES, parameter_spec
from sparsejax.tree import axes_of, leaves, map_with_path
from sparsejax.typing import Output

WIDTH, SHAPE = 12, (4, 4, 12)
SMALL = {"sub_keys": 4, "heads": 2, "per_head": 5, "key_width": 8}
CONFIGS = {
    "product_key": memory.MemoryConfig(**SMALL),
    "memory_plus": memory.MemoryPlusConfig(**SMALL, value_width=8),
    "peer": memory.PEERConfig(**SMALL),
    "fff": memory.FastFeedForwardConfig(depth=3, leaf_width=4, activation="gelu"),
}
VARIANTS = {
    "product_key/projected": replace(CONFIGS["product_key"], value_width=8),
    "product_key/gated": replace(CONFIGS["product_key"], gate="swilu"),
    "product_key/rms": replace(CONFIGS["product_key"], query_norm="rms"),
    "product_key/batch": replace(CONFIGS["product_key"], query_norm="batch"),
    "memory_plus/layer": replace(CONFIGS["memory_plus"], query_norm="layer"),
    "memory_plus/plain": replace(CONFIGS["memory_plus"], qk_norm="none", gate="none"),
    "peer/sigmoid": replace(CONFIGS["peer"], scores="sigmoid", activation="silu"),
    "peer/relu": replace(CONFIGS["peer"], scores="relu"),
    "fff/hard": replace(CONFIGS["fff"], path="hard"),
}
every_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
every_variant = pytest.mark.parametrize(
    "config", [*CONFIGS.values(), *VARIANTS.values()], ids=[*CONFIGS, *VARIANTS]
)


@cache
def build(config, *, seed=0, init_scale=1.0):
    """Split a fresh layer, and the pool that it reads if it reads one."""
    options = {"init_scale": init_scale, "rngs": nnx.Rngs(seed)}
    layer = MEMORIES[config.kind](config, WIDTH, **options)
    pooled = config.kind == "memory_plus"
    pool = memory.ValuePool(config, WIDTH, rngs=nnx.Rngs(9)) if pooled else None
    return nnx.split((layer, pool))


def call(graph, state, x, **keywords):
    layer, pool = nnx.merge(graph, state)
    return layer(x, *([] if pool is None else [pool.values[...]]), **keywords)


class Evaluated(NamedTuple):
    """What one step of training needs to know."""

    out: Output
    loss: jax.Array
    slopes: tuple  # of the loss, by the parameters and by the input


@partial(jax.jit, static_argnums=0)
def evaluate(graph, state, x, **keywords):
    def loss_of(state, x):
        out = call(graph, state, x, **keywords)
        square = jnp.mean(jnp.sin(out.value.astype(jnp.float32)))
        return square + sum(out.losses.values(), jnp.zeros(())), out

    graded = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
    (loss, out), slopes = graded(state, x)
    return Evaluated(out, loss, slopes)


def tokens(key, dtype=jnp.float32):
    return jax.random.normal(key, SHAPE, dtype)


def test_every_kind_has_a_config_of_its_name():
    assert {k: c.kind for k, c in CONFIGS.items()} == {k: k for k in MEMORIES}


@pytest.mark.few(4)
@every_variant
def test_layer_keeps_shape_and_dtype(config, key):
    out = evaluate(*build(config), tokens(key)).out
    half = jax.eval_shape(partial(evaluate, *build(config)), tokens(key, jnp.bfloat16))
    assert np.isfinite(out.value).all()
    assert out.value.shape == half.out.value.shape == SHAPE
    assert (out.value.dtype, half.out.value.dtype) == (jnp.float32, jnp.bfloat16)
    assert set(out.metrics) == {"usage", "dead", "usage_kl", "entropy"}
    scalars = [*half.out.metrics.values(), *half.out.losses.values()]
    assert all(x.shape == () and x.dtype == jnp.float32 for x in scalars)


@every_variant
def test_wide_numbers_elsewhere_change_no_dtype(config, key):
    with jax.enable_x64(True):
        graph, state = build.__wrapped__(config)
        x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        found = jax.eval_shape(partial(call, graph), state, x)
    assert {str(x.dtype) for x in jax.tree.leaves((state, found))} == {"float32"}


@pytest.mark.few(4)
@every_variant
def test_slope_in_any_direction_is_the_difference_quotient(config, key):
    if config.kind != "fff":  # the choice of slots is a step, which has no slope
        config = replace(config, per_head=config.slots)
    graph, state = build(config)
    x, target = tokens(key), tokens(jax.random.fold_in(key, 1))
    slopes = evaluate(graph, state, x).slopes
    still = "node" if config == VARIANTS["fff/hard"] else "nothing"
    direction = map_with_path(
        lambda path, v: jnp.zeros_like(v) if still in path else jnp.sin(99 * v), state
    )
    sideways = target if still == "nothing" else jnp.zeros_like(x)

    def loss(step):
        moved = jax.tree.map(lambda a, b: a + step * b, state, direction)
        return np.float64(evaluate(graph, moved, x + step * sideways).loss)

    found = jax.tree.map(jnp.vdot, slopes, (direction, sideways))
    quotient = (loss(4e-3) - loss(-4e-3)) / 8e-3
    np.testing.assert_allclose(sum(jax.tree.leaves(found)), quotient, rtol=2e-2)


@pytest.mark.few(2)
@every_kind
def test_bfloat16_input_errs_by_its_own_rounding_only(config, key):
    graph, state = build(config)
    x = tokens(key, jnp.bfloat16)
    half = evaluate(graph, state, x)
    wide = evaluate(graph, state, x.astype(jnp.float32))
    for a, b, factor in [
        (half.out.value, wide.out.value, 2),
        (half.slopes[1], wide.slopes[1], 3),
    ]:
        error = np.abs(np.float32(a) - b).max()
        # One rounding of the result, and one of the hidden values before it.
        assert error <= factor * 2 * 2**-8 * np.abs(b).max()


@every_kind
def test_same_seed_same_layer_and_same_input_same_output(config, key):
    x = tokens(key)
    first = evaluate(*build.__wrapped__(config), x)
    second = evaluate(*build.__wrapped__(config), x)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = evaluate(*build(config, seed=1), x)
    assert not np.array_equal(first.out.value, other.out.value)


@every_kind
def test_tokens_do_not_see_each_other(config, key):
    (graph, state), x = build(config), tokens(key)
    y = evaluate(graph, state, x).out.value
    changed = evaluate(graph, state, x.at[2, 1].set(-x[2, 1])).out.value
    same = np.isclose(y, changed, rtol=1e-6, atol=1e-6).all(-1)
    assert same.sum() == same.size - 1
    assert not same[2, 1]


@every_kind
def test_init_scale_scales_the_output(config, key):
    full = evaluate(*build(config), tokens(key)).out.value
    half = evaluate(*build(config, init_scale=0.5), tokens(key)).out.value
    np.testing.assert_allclose(half, full / 2, rtol=1e-5, atol=1e-6)


@every_kind
def test_no_tokens_give_no_output_and_finite_metrics(config):
    empty = jnp.zeros((0, 4, WIDTH))
    out = jax.jit(partial(call, build(config)[0]))(build(config)[1], empty)
    assert out.value.shape == (0, 4, WIDTH)
    assert all(np.isfinite(x) for x in (*out.metrics.values(), *out.losses.values()))


@every_kind
def test_padding_is_not_counted(config, key):
    (graph, state), x = build(config), tokens(key)
    valid = jnp.arange(4)[:, None] < jnp.array([[1, 2, 3, 4]])
    padded = evaluate(graph, state, x, valid=valid).out
    changed = jnp.where(valid[..., None], x, -x)
    changed = evaluate(graph, state, changed, valid=valid).out
    same = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(same, padded[1:], changed[1:])
    everything = evaluate(graph, state, x).out
    assert padded.metrics["usage_kl"] != everything.metrics["usage_kl"]


@every_kind
def test_constructor_can_be_stacked_over_keys(config, key):
    def make(key):
        layer = MEMORIES[config.kind](config, WIDTH, rngs=nnx.Rngs(key))
        return nnx.state(layer)

    one = jax.eval_shape(make, key)
    stacked = jax.eval_shape(jax.vmap(make), jax.random.split(key, 3))
    assert axes_of(one) == axes_of(stacked)
    shapes = {path: (3, *leaf.shape) for path, leaf in leaves(one).items()}
    assert {path: leaf.shape for path, leaf in leaves(stacked).items()} == shapes


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*CONFIGS, "product_key/gated", "fff/hard"])
def test_sharded_layer_is_the_layer(name, key, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4 * 10 * WIDTH)  # several tiles
    graph, state = build((CONFIGS | VARIANTS)[name])
    x = tokens(key)
    expected = evaluate(graph, state, x)
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.make_mesh((2, 2, 1, 2, 1), MESH_AXES, kinds)
    place = partial(NamedSharding, mesh)
    with jax.set_mesh(mesh):
        shards = jax.tree.map(
            lambda v: jax.device_put(v, place(parameter_spec(v.axes))),
            state,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
        cut = [len(v.sharding.device_set) for v in jax.tree.leaves(shards)]
        rows = jax.device_put(x, place(PartitionSpec(("data", "fsdp"))))
        found = evaluate(graph, shards, rows)
    assert max(cut) == 8
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, found, expected)
