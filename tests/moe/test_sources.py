"""What a layer owns for its router: trained, moved by evidence, or not there at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.config import ConfigError, FieldError, convert
from sparsejax.moe import ROUTERS, STATES, TABLES, MoE, MoEConfig, RouterState
from sparsejax.moe.layer import asks_again
from sparsejax.nn import ModelConfig
from sparsejax.tree import axes_of
from tests.moe.routed import BATCH, EXPERTS, IDS, TOKENS, choices, ids_of

WIDTH = 16
SHAPE = BATCH, TOKENS // BATCH
OWNED = {
    "logits": {"router"},
    "cosines": {"projection", "centroids", "sharpness"},
    "noise": {"noise"},
    "gain": {"gain"},
}


def config(router="softmax_top_k", **settings):
    """Of a layer; all tokens through all experts compile soonest."""
    sizes = {"experts": EXPERTS, "per_token": choices(router), "hidden": 12}
    sizes["dispatcher"] = "dense"
    return MoEConfig(**(sizes | {"router": router} | settings))


@pytest.fixture
def tables(tmp_path):
    """Settings that a router needs beside its name."""
    path = str(tmp_path / "table.npy")
    np.save(path, TABLES["random"](IDS, EXPERTS))
    return {"hash_table": {"table": path}}


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (*SHAPE, WIDTH))


def about(key=None):
    positions = jnp.broadcast_to(jnp.arange(SHAPE[1], dtype=jnp.int32)[None], SHAPE)
    ids = {"tokens": ids_of(0).reshape(SHAPE), "previous": ids_of(1).reshape(SHAPE)}
    return ids | {"positions": positions, "key": key}


def run(moe, x=None, key=None, **more):
    graph, state = nnx.split(moe)
    x = tokens() if x is None else x
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x, **about(key), **more))
    return call(state, x)


@pytest.mark.few(4)
@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_a_layer_trains_two_steps_with_every_router(router, tables):
    """Everything that a router reads moves; nothing else is there to move."""
    settings = config(router, **tables.get(router, {}))
    moe = MoE(settings, WIDTH, rngs=nnx.Rngs(0))
    graph, params, state = nnx.split(moe, nnx.Param, ...)
    expected = {"gate", "up", "down"}.union(
        *(OWNED.get(name, set()) for name in settings.sources)
    )
    assert set(axes_of(params)) == expected

    @jax.jit
    def step(params, state, key):
        def loss(params):
            out = nnx.merge(graph, params, state)(tokens(), **about(key))
            error = jnp.square(out.value - jnp.roll(tokens(), 1, axis=-1)).mean()
            return error + sum(out.losses.values()), out

        gradient, out = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        model = nnx.merge(graph, params, state)
        for name in STATES:
            if hasattr(model, name):
                evidence = out.metrics[f"evidence/{name}"]
                value = getattr(model, name)[...]
                moved = STATES[name].update(value, evidence, settings)
                getattr(model, name)[...] = moved
        return *nnx.split(model, nnx.Param, ...)[1:], out

    before = params
    for n in range(2):
        params, state, out = step(params, state, jax.random.key(n))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, out)))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, params)
    assert all(jax.tree.leaves(moved)), moved


def test_a_config_names_how_groups_are_multiplied():
    values = [
        run(MoE(config(dispatcher="grouped", **named), WIDTH, rngs=nnx.Rngs(0))).value
        for named in ({}, {"implementation": "reference"})
    ]
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6)
    named = config(dispatcher="grouped", implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="implementation='mosaic_gpu'"):
        run(MoE(named, WIDTH, rngs=nnx.Rngs(0)))


def test_what_nobody_reads_is_not_built():
    assert not hasattr(MoE(config("hash_random"), WIDTH, rngs=nnx.Rngs(0)), "router")
    state = nnx.state(MoE(config("k_means"), WIDTH, rngs=nnx.Rngs(0)), RouterState)
    assert set(axes_of(state)) == {"means"}


def test_parameter_free_scores_have_no_balancing_loss():
    assert set(run(MoE(config("k_means"), WIDTH, rngs=nnx.Rngs(0))).losses) == set()
    assert set(run(MoE(config(), WIDTH, rngs=nnx.Rngs(0))).losses) == {"balance", "z"}


@pytest.mark.parametrize("router", ["cosine_top_k", "k_means"])
def test_cosines_ignore_the_length_of_a_token(router):
    moe = MoE(config(router), WIDTH, rngs=nnx.Rngs(0))
    a, b = (run(moe, scale * tokens()).metrics for scale in (1.0, 9.0))
    np.testing.assert_array_equal(a["load"], b["load"])
    same = a["router_confidence"], b["router_confidence"]
    np.testing.assert_allclose(*same, rtol=1e-5)


def test_a_cosine_router_has_few_parameters():
    moe = MoE(config("cosine_top_k", router_width=4), WIDTH, rngs=nnx.Rngs(0))
    sizes = [moe.projection.size, moe.centroids.size, moe.sharpness.size]
    assert sum(sizes) == 4 * (WIDTH + EXPERTS) + 1


def test_one_hop_more_adds_the_answer_to_the_question():
    moe = MoE(config(hops=2), WIDTH, rngs=nnx.Rngs(0))
    once = MoE(config(), WIDTH, rngs=nnx.Rngs(0))
    first = run(once).value
    expected = first + run(once, tokens() + first).value
    out = run(moe)
    np.testing.assert_allclose(out.value, expected, rtol=1e-4, atol=1e-5)
    assert float(out.metrics["load"].sum()) == 2 * 2 * TOKENS


def test_a_token_asks_again_unless_its_answer_is_short_beside_it():
    x = jnp.ones((1, 4, 9))
    answer = x * jnp.asarray([0.0, 0.1, 0.3, -2.0])[None, :, None]
    assert asks_again(x, answer, 0.2).tolist() == [False, False, True, True]
    assert asks_again(x, answer, 0.0).all()


def test_tokens_halt_after_an_answer_that_is_short_beside_them():
    def load(halt_below):
        moe = MoE(config(hops=3, halt_below=halt_below), WIDTH, rngs=nnx.Rngs(0))
        out = run(moe)
        return float(out.metrics["load"].sum()) / (2 * TOKENS), out.value

    one = run(MoE(config(), WIDTH, rngs=nnx.Rngs(0))).value
    counts, values = zip(*map(load, (1e-6, 0.2, 1e6)), strict=True)
    assert counts[0] == 3
    assert 1 < counts[1] < 3
    assert counts[2] == 1
    np.testing.assert_allclose(values[2], one, rtol=1e-5, atol=1e-6)


def test_the_second_round_counts_for_the_bias_as_the_first_does():
    """Its evidence is all visits, of the tokens that asked."""
    router = {"router": "sigmoid_top_k", "bias_rate": 0.1, "hops": 2}
    moe = MoE(config(**router, halt_below=0.2), WIDTH, rngs=nnx.Rngs(0))
    found = run(moe).metrics
    visits = float(found["load"].sum())
    assert choices("sigmoid_top_k") * TOKENS < visits
    np.testing.assert_array_equal(found["evidence/bias"], found["load"])


def test_a_random_key_is_used_in_training_only():
    moe = MoE(config("noisy_top_k"), WIDTH, rngs=nnx.Rngs(0))
    a, b, c = (run(moe, key=k).value for k in (None, None, jax.random.key(1)))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_a_layer_without_the_ids_its_router_hashes_says_so():
    moe = MoE(config("hash_random"), WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tokens=None: this router hashes them"):
        moe(tokens())


@pytest.mark.parametrize(
    ("router", "settings", "message"),
    [
        ("hash_random", {"bias_rate": 0.1}, "bias_rate=0.1: .* reads no bias"),
        ("hash_table", {}, "table=None: .* needs the file of one; write it with"),
        ("hash_table", {"table": "no.npy"}, "table='no.npy': no such file"),
        ("switch", {"table": "no.npy"}, "table='no.npy': .* looks nothing up"),
        ("switch", {"halt_below": 0.1}, "halt_below=0.1: a single hop cannot halt"),
        ("switch", {"hops": 0}, "hops=0: at least 1"),
        ("sigma_moe", {"router_arguments": {"expert_dropout": 1.0}},
         r"expert_dropout=1\.0: must be in"),
        ("switch", {"implementation": "xla"}, "implementation='xla': .*'dense' has no"),
        ("switch", {"implementation": "xl", "dispatcher": "grouped"},
         "implementation='xl'.*did you mean 'xla'"),
        ("remoe", {"state_rate": -1.0}, "state_rate=-1.0: at least 0"),
        ("hash_random", {"per_token": 2}, "k=2: a hash visits one expert"),
        ("selective_sinkhorn", {"router_arguments": {"probability": 2.0}},
         "probability=2.0: must be between 0 and 1"),
        ("block_ffn", {"router_arguments": {"chunk": 0}}, "chunk=0: must be at least"),
    ],
)  # fmt: skip
def test_config_names_what_a_router_cannot_do(router, settings, message):
    with pytest.raises(FieldError, match=message):
        config(router, **settings)


def test_a_causal_model_refuses_a_router_that_reads_the_future():
    ffn = {"kind": "moe", "experts": 8, "per_token": 2, "hidden": 8}
    values = {"depth": 1, "width": 8, "heads": 1, "kv_heads": 1}
    values["ffn"] = ffn | {"router": "expert_choice"}
    message = r"router='expert_choice': .*take 'expert_choice_by_position'"
    with pytest.raises(ConfigError, match=message):
        convert(ModelConfig, values)
    values["ffn"] = ffn | {"router": "expert_choice_by_position"}
    assert convert(ModelConfig, values).ffn.router == "expert_choice_by_position"
    values["ffn"] = ffn | {"router": "expert_choice"}
    values["attention"] = {"pattern": "full", "causal": False}
    assert convert(ModelConfig, values).ffn.router == "expert_choice"
