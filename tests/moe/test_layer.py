"""The layer: same on any mesh, blind to padding, and clear about what it cannot do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from sparsejax.config import ConfigError, FieldError, convert
from sparsejax.moe import (
    DISPATCHERS,
    EXCHANGES,
    MoE,
    MoEConfig,
    RouterBias,
    updated_bias,
)
from sparsejax.partition import MESH_AXES
from sparsejax.tree import axes_of
from tests.slowly import slowly

WIDTH = 16
DROPLESS = {"dense": {}, "grouped": {}, "capacity": {"capacity_factor": 100.0}}


def config(**settings):
    return MoEConfig(**({"experts": 8, "per_token": 2, "hidden": 12} | settings))


def layer(seed=0, **settings):
    """A layer whose router has opinions."""
    moe = MoE(config(**settings), WIDTH, rngs=nnx.Rngs(seed))
    moe.router[...] = 20 * moe.router[...]
    return moe


def tokens(batch=8, length=4, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (batch, length, WIDTH)).astype(dtype)


def run(moe, x=None):
    graph, state = nnx.split(moe)
    x = tokens() if x is None else x
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def step_of(moe):
    """Values, losses, metrics and all gradients of a layer, as a function of arrays."""
    graph, state = nnx.split(moe)

    @jax.jit
    def step(state, x, valid):
        def total(state, x):
            out = nnx.merge(graph, state)(x, valid=valid)
            target = jnp.cos(jnp.arange(out.value.size)).reshape(out.value.shape)
            return (out.value * target).sum() + sum(out.losses.values()), out

        grads, out = jax.grad(total, (0, 1), has_aux=True)(state, x)
        return out, grads

    return step, state


def assert_close(a, b, tolerance=3e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(left), np.asarray(right), rtol=tolerance, atol=tolerance
        )


MESHES = {
    "expert 4": (1, 1, 4, 1, 1),
    "expert 8": (1, 1, 8, 1, 1),
    "data 2, expert 2, tensor 2": (2, 1, 2, 2, 1),
    "fsdp 2, tensor 2, context 2": (1, 2, 1, 2, 2),
}
# The exchanges' own tests go through 2, 4 and 8 devices.
CASES = [(name, "grouped") for name in MESHES if name != "expert 4"] + [
    ("expert 4", "capacity"),
    ("data 2, expert 2, tensor 2", "capacity"),
    ("data 2, expert 2, tensor 2", "dense"),
]
QUICK = {("data 2, expert 2, tensor 2", "grouped")}


def mesh_of(shape):
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds)


@functools.cache
def everything(dispatcher):
    """Every feature at once, with some padding and some drops."""
    step, state = step_of(
        layer(
            dispatcher=dispatcher,
            capacity_factor=None if dispatcher == "dense" else 1.0,
            shared=6,
            bias_rate=1e-3,
            router="sigmoid_top_k",
        )
    )
    valid = jnp.ones((8, 4), bool).at[3, 2:].set(False)
    return step(state, tokens(), valid)


@pytest.mark.parametrize(("shape", "dispatcher"), slowly(CASES, but=QUICK))
def test_any_mesh_equals_one_device(shape, dispatcher):
    """Values, drops, statistics and the gradients of tokens, router and experts."""
    alone = everything(dispatcher)
    with jax.set_mesh(mesh_of(MESHES[shape])):
        assert_close(everything.__wrapped__(dispatcher), alone)


def test_a_moe_layer_is_the_weighted_sum_of_the_experts_that_are_likeliest():
    moe = layer(dispatcher="grouped")
    x, found = tokens(batch=2), run(moe, tokens(batch=2)).value
    rows = np.float64(x).reshape(-1, WIDTH)
    router, gate, up, down = (
        np.float64(w[...]) for w in (moe.router, moe.gate, moe.up, moe.down)
    )
    for row, answer in zip(rows, np.asarray(found).reshape(rows.shape), strict=True):
        p = np.exp(row @ router)
        best = np.argsort(-p)[:2]
        inner = [row @ gate[e] for e in best]
        each = [
            (g / (1 + np.exp(-g)) * (row @ up[e])) @ down[e]
            for g, e in zip(inner, best, strict=True)
        ]
        expected = (p[best, None] * each).sum(axis=0) / p[best].sum()
        np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_a_layer_is_one_shard_map_which_checks_what_varies(exchange):
    moe = layer(dispatcher="grouped", exchange=exchange, capacity_factor=1.0)
    graph, state = nnx.split(moe)
    with jax.set_mesh(mesh_of(MESHES["data 2, expert 2, tensor 2"])):
        text = str(jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, tokens()))
    assert text.count("shard_map[") == 1
    assert "check_vma=True" in text


def test_the_log_normaliser_is_reported_whatever_its_loss_weighs():
    moe = layer(z_weight=0.0)
    logits = np.float64(tokens()).reshape(-1, WIDTH) @ np.float64(moe.router[...])
    expected = (np.log(np.exp(logits).sum(axis=1)) ** 2).mean()
    found = run(moe)
    assert "z" not in found.losses
    np.testing.assert_allclose(found.metrics["router_z"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("router", "factor"), [("expert_choice", None), ("remoe", 0.5), ("remoe", None)]
)
def test_what_bounds_the_visits_of_an_expert_changes_no_answer(router, factor):
    given = {"router": router, "capacity_factor": factor}
    step, state = step_of(layer(**given, dispatcher="dense"))
    valid = jnp.ones((8, 4), bool).at[3, 2:].set(False)
    expected = step(state, tokens(), valid)
    step, _ = step_of(layer(**given, dispatcher="grouped"))
    assert_close(step(state, tokens(), valid), expected)


# Routers that leave the number of visits open, and those that look at all tokens.
WIDE = ["block_ffn", "expert_choice", "expert_choice_by_position", "remoe"]
WAYS = {
    "ring": "expert 4",
    "ragged_all_to_all": "expert 8",
    "all_to_all": "data 2, expert 2, tensor 2",
}


@pytest.mark.few(2)
@pytest.mark.parametrize("exchange", sorted(WAYS))
@pytest.mark.parametrize("router", [*WIDE, "k_means", "s_base"])
def test_routers_that_look_around_choose_alike_on_every_mesh(router, exchange):
    settings = {"dispatcher": "grouped", "exchange": exchange, "router": router}
    moe = MoE(config(**settings), WIDTH, rngs=nnx.Rngs(0))
    valid = jnp.ones((8, 4), bool).at[3, 2:].set(False)

    def found():
        step, state = step_of(moe)
        return step(state, tokens(), valid)

    alone = found()
    with jax.set_mesh(mesh_of(MESHES[WAYS[exchange]])):
        assert_close(found(), alone)


@pytest.mark.few(1)
@pytest.mark.parametrize("dispatcher", sorted(DISPATCHERS))
def test_padding_changes_nothing_and_gets_nothing(dispatcher):
    step, state = step_of(
        layer(dispatcher=dispatcher, **DROPLESS[dispatcher], shared=6)
    )
    valid = jnp.ones((8, 4), bool).at[:, 3:].set(False)
    clean = step(state, tokens(), valid)
    poisoned = step(state, tokens().at[:, 3:].set(jnp.nan), valid)
    assert_close(clean, poisoned)
    out, (_, dx) = poisoned
    assert not out.value[:, 3:].any()
    assert not dx[:, 3:].any()
    assert float(out.metrics["load"].sum()) == 8 * 3 * 2


def test_dispatchers_agree_through_the_layer():
    slow, *fast = (
        step_of(layer(dispatcher=name, **DROPLESS[name]))[0](
            step_of(layer())[1], tokens(), None
        )
        for name in ("dense", "grouped", "capacity")
    )
    for out, grads in fast:
        assert_close((out.value, out.losses, grads), (slow[0].value, slow[0].losses,
                                                      slow[1]))  # fmt: skip


def test_capacity_drops_are_counted():
    dropped = run(layer(capacity_factor=0.5)).metrics["dropped"]
    assert dropped >= 0.5 - 1e-6
    assert "dropped" not in run(layer()).metrics


def test_losses_are_weighted_and_can_be_left_out():
    out, twice = run(layer()), run(layer(balance_weight=0.02))
    assert set(out.losses) == {"balance", "z"}
    np.testing.assert_allclose(twice.losses["balance"], 2 * out.losses["balance"])
    assert not run(layer(balance_weight=0.0, z_weight=0.0)).losses


def test_a_shared_expert_answers_every_token():
    moe = layer(shared=6)
    moe.down[...] = jnp.zeros_like(moe.down[...])
    x = tokens()
    hidden = jax.nn.silu(x @ moe.shared_gate[...]) * (x @ moe.shared_up[...])
    assert_close(run(moe).value, hidden @ moe.shared_down[...])


def test_router_bias_is_state_of_its_own_and_steers_by_the_reported_load():
    moe = layer(router="sigmoid_top_k", bias_rate=0.01)
    _, bias, _ = nnx.split(moe, RouterBias, ...)
    assert set(axes_of(bias)) == {"bias"}
    assert "bias" not in axes_of(nnx.state(moe, nnx.Param))
    rate = moe.bias.get_metadata()["rate"]
    graph, state = nnx.split(moe)

    def step(state, _):
        moe = nnx.merge(graph, state)
        measured = moe(tokens(32)).metrics
        moe.bias[...] = updated_bias(moe.bias[...], measured["load"], rate)
        return nnx.state(moe), measured["load_violation"]

    _, violation = jax.lax.scan(step, state, None, length=60)
    assert violation[-1] < violation[0] / 2


def test_layers_stack():
    """Built under vmap and run by scan, layers are what they are one by one."""
    keys = jax.random.split(jax.random.key(0), 3)

    def build(key):
        return MoE(config(shared=6, bias_rate=0.0), WIDTH, rngs=nnx.Rngs(key))

    graph = nnx.graphdef(build(keys[0]))
    stacked = jax.vmap(lambda key: nnx.state(build(key)))(keys)

    def body(x, state):
        return x + nnx.merge(graph, state)(x).value, None

    out, _ = jax.lax.scan(body, tokens(), stacked)  # weights and bias per layer
    x = tokens()
    for key in keys:
        x, _ = jax.jit(body)(x, nnx.state(build(key)))
    assert_close(out, x)


def test_compiles_once():
    traces = []
    graph, state = nnx.split(layer())

    @jax.jit
    def forward(state, x):
        traces.append(1)
        return nnx.merge(graph, state)(x).value

    for seed in range(3):
        forward(state, tokens() + seed)
    assert len(traces) == 1


def test_routing_in_bfloat16_is_routing_in_float32():
    moe = layer()
    low = tokens(dtype=jnp.bfloat16)
    out, exact = run(moe, low), run(moe, low.astype(jnp.float32))
    assert out.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.metrics["load"], exact.metrics["load"])
    error = jnp.abs(out.value.astype(jnp.float32) - exact.value).max()
    assert error <= 2**-6 * jnp.abs(exact.value).max()  # three products and an average


def test_an_expert_axis_must_divide_the_experts():
    moe = layer(experts=6)
    with (
        jax.set_mesh(mesh_of((1, 1, 4, 1, 1))),
        pytest.raises(ValueError, match="experts=6: the mesh axis 'expert' of 4"),
    ):
        moe(tokens())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_token": 9}, "per_token=9: at most experts=8"),
        ({"router": "switsch"}, "router='switsch'.*did you mean 'switch'"),
        ({"dispatcher": "gruped"}, "dispatcher='gruped'.*did you mean 'grouped'"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: a capacity below one"),
        ({"dispatcher": "capacity"}, "capacity_factor=None: .* needs one"),
        ({"router": "switch"}, "router='switch': k=2: switch visits one"),
        ({"router_arguments": {"renormalise": True}},
         "router_arguments.renormalise=True: .*did you mean 'renormalize'"),
        ({"router_arguments": {"renormalize": 1}}, "renormalize=1: expected bool"),
        ({"router": "sigmoid_top_k", "router_arguments": {"groups": 3}},
         "router='sigmoid_top_k': groups=3: must divide the 8 experts"),
        ({"experts": 0}, "experts=0: at least 1"),
        ({"z_weight": -1.0}, "z_weight=-1.0: at least 0"),
        ({"bias_rate": -1.0}, "bias_rate=-1.0"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf: .* and finite, or"),
        ({"capacity_rounding": "down"}, "'down': has no effect without capacity_f"),
        ({"capacity_priority": "score"}, "'score': has no effect without capacity_f"),
        ({"router_width": 8}, "router_width=8: has no effect without a router that"),
        ({"state_rate": 0.1}, "state_rate=0.1: has no effect without a router that h"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_config_names_the_fault(settings, message):
    with pytest.raises(FieldError, match=message):
        config(**settings)


def test_config_comes_from_plain_values():
    values = {
        "experts": 8,
        "per_token": 2,
        "hidden": 12,
        "router": "sigmoid_top_k",
        "router_arguments": {"groups": 4, "kept_groups": 2, "scale": 2.5},
    }
    assert convert(MoEConfig, values).router_arguments["groups"] == 4
    with pytest.raises(ConfigError, match=r"config\.router_arguments\.group"):
        convert(MoEConfig, values | {"router_arguments": {"group": 4}})


def test_the_scores_that_the_router_chose_by_are_told():
    moe = layer()
    told = run(moe).metrics
    expected = tokens().reshape(-1, WIDTH) @ moe.router[...]
    np.testing.assert_allclose(told["evidence/scores"], expected, rtol=1e-5, atol=1e-5)
    best = jnp.argmax(told["evidence/scores"], axis=-1)
    np.testing.assert_array_equal(told["evidence/experts"][:, 0], best)
