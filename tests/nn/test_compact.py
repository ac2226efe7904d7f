"""What masks have emptied is taken out, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig, LatentConfig
from sparsejax.masked import FanIn, MaskedConfig, effective, sparse
from sparsejax.moe import MoEConfig
from sparsejax.nn import GatedConfig, ModelConfig, Transformer, by_fan_in, compact
from sparsejax.nn.cost import cost
from sparsejax.tree import map_with_path

CONFIG = ModelConfig(
    depth=2,
    width=16,
    heads=8,
    kv_heads=4,
    attention=AttentionConfig(block_q=16, block_kv=16, learned_sinks=True),
    ffn=GatedConfig(hidden=12),
)
MIXED = MoEConfig(experts=3, per_token=2, hidden=10, shared=6, biases=True)
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 32, jnp.int32)

# Where a layer is cut: (end of the path, index of "l …").
GATED = [
    ("ffn/down", np.s_[0, 3:6]),  # three channels of the first layer are not read
    ("ffn/gate", np.s_[0, :, 0]),  # one has no gate
    ("ffn/up", np.s_[1, :, 2:9]),  # seven of the second are nothing
]
HEADS = [
    ("attention/value", np.s_[:, :, 1]),  # a key-value head with both its query heads
    ("attention/out", np.s_[:, 4]),  # one query head of each of the others
    ("attention/out", np.s_[:, 1]),
    ("attention/out", np.s_[:, 6]),
    ("attention/value", np.s_[1, :, 0]),  # and in the second layer one more
]
EXPERTS = [
    ("moe/down", np.s_[:, :, 2:5]),
    ("moe/down", np.s_[0, 1, 0:6]),
    ("moe/shared_up", np.s_[:, :, 1]),
]


def emptied(config, holes):
    model = Transformer(config, 32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def cut(path, x):
        for end, index in holes:
            x = x.at[index].set(0) if path.endswith(end) else x
        return x

    return nnx.merge(graph, map_with_path(cut, state))


def logits(model):
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graph, state)
        return model.logits(model(TOKENS).value)

    return run(state)[..., :32]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("config", "holes", "sizes"),
    [
        pytest.param(
            CONFIG,
            [*GATED, *HEADS],
            {"heads": 3, "kv_heads": 3, "hidden": 8},
            id="gated",
        ),
        pytest.param(
            dataclasses.replace(CONFIG, ffn=MIXED),
            EXPERTS,
            {"heads": 8, "kv_heads": 4, "hidden": 7, "shared": 5},
            id="experts",
        ),
    ],
)
def test_a_smaller_model_has_the_same_outputs(config, holes, sizes):
    model = emptied(config, holes)
    small = compact(model)
    found = vars(small.config) | vars(small.config.ffn)
    assert {name: found[name] for name in sizes} == sizes
    assert small.config.attention.head_width == 2
    np.testing.assert_allclose(logits(small), logits(model), rtol=1e-5, atol=1e-5)
    before, after = (
        cost(x.config, nnx.state(x, nnx.Param), length=16) for x in (model, small)
    )
    assert after.total < before.total
    assert after.useful_flops < before.useful_flops


@pytest.mark.parametrize(
    ("structure", "include", "shrinks"),
    [
        ({"structure": "column"}, ("ffn/up",), "hidden"),
        (
            {"structure": "heads", "structure_arguments": {"axis": "hg"}},
            ("attention/(value|out)",),
            "heads",
        ),
    ],
)
def test_what_a_plan_has_pruned_comes_out(structure, include, shrinks):
    model = Transformer(CONFIG, 32, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    plan = MaskedConfig(density=0.5, schedule="constant", include=include, **structure)
    masked = effective(params, sparse(optax.sgd(0.1), plan).init(params), plan)
    model = nnx.merge(graph, masked, rest)
    small = compact(model)
    assert (small.config.heads < 8) == (shrinks == "heads")
    assert small.config.ffn.hidden == (6 if shrinks == "hidden" else 12)
    np.testing.assert_allclose(logits(small), logits(model), rtol=1e-5, atol=1e-5)


def test_a_full_model_stays_as_it_is():
    model = Transformer(CONFIG, 32, rngs=nnx.Rngs(0))
    small = compact(model)
    assert small.config.heads == 8
    assert small.config.ffn == CONFIG.ffn
    for x, y in zip(*map(jax.tree.leaves, map(nnx.state, (model, small))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_an_empty_layer_keeps_one_unit():
    every = np.s_[:]
    model = emptied(CONFIG, [("ffn/down", every), ("attention/out", every)])
    small = compact(model).config
    assert (small.heads, small.kv_heads, small.ffn.hidden) == (1, 1, 1)


def test_what_something_comes_of_is_not_dead():
    """The gate alone speaks where one is added to what is multiplied by it."""
    ffn = dataclasses.replace(MIXED, activation="clamped_swiglu", shared=0)
    model = emptied(dataclasses.replace(CONFIG, ffn=ffn), [("moe/up", np.s_[..., 0:3])])
    assert compact(model).config.ffn.hidden == MIXED.hidden


@pytest.mark.parametrize("change", [{"qk_norm_over": "heads"}, {"selector": "moba"}])
def test_heads_that_others_depend_on_stay(change):
    attention = dataclasses.replace(CONFIG.attention, learned_sinks=False, **change)
    model = emptied(dataclasses.replace(CONFIG, attention=attention), HEADS)
    assert compact(model).config.heads == 8


def test_heads_of_latent_attention_stay():
    latent = LatentConfig(kv_rank=4, plain_width=2, rotated_width=2, value_width=2)
    attention = dataclasses.replace(CONFIG.attention, latent=latent)
    config = dataclasses.replace(CONFIG, attention=attention, kv_heads=8)
    assert compact(emptied(config, [HEADS[1]])).config == config


def test_a_model_by_fan_in_has_the_same_outputs(monkeypatch):
    monkeypatch.setattr("sparsejax.masked.fan_in.FEW", TOKENS.size)
    thin = np.arange(16)[:, None] % 5 == np.arange(12)[None] % 5  # three inputs or four
    model = emptied(CONFIG, [("ffn/gate", np.s_[:, ~thin]), ("ffn/down", np.s_[:, 3:])])
    small = by_fan_in(model)
    ffn = small.stacks[0].blocks[0].ffn
    kinds = [isinstance(w[...], FanIn) for w in (ffn.gate, ffn.up, ffn.down)]
    assert kinds == [True, False, True]
    np.testing.assert_allclose(logits(small), logits(model), rtol=1e-5, atol=1e-5)
