"""A model whose attention the data decide: generates, scans, remats, and has a cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.cost import attention_masks, cost
from sparsejax.nn.generate import generate
from sparsejax.nn.transformer import Transformer
from tests.slowly import slowly

VOCABULARY, BLOCK = 30, 4
SELECTIONS = {
    "moba": {"top": 2},
    "nsa": {"top": 2, "near": 1, "length": 4, "stride": 2, "window": 6, "hidden": 8},
    "dsa": {"top": 6, "heads": 2, "width": 8, "rotated": 4},
    "misa": {"top": 6, "heads": 2, "width": 8, "rotated": 4, "routed": 1, "block": 4},
    "dma": {"top": 6},
    "persistent_memory": {"slots": 3},
    "routing": {"clusters": 3, "top": 6},
}


def config(name, *, depth=2, remat="none", **attention):
    given = {"selector": name, "selection": SELECTIONS.get(name, {})}
    given |= {"block_q": BLOCK, "block_kv": BLOCK}
    return ModelConfig(
        depth=depth,
        width=32,
        heads=4,
        kv_heads=2,
        attention=AttentionConfig(**given | attention),
        ffn=GatedConfig(hidden=32),
        remat=remat,
    )


def build(*args, **kwargs):
    return Transformer(config(*args, **kwargs), VOCABULARY, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", slowly(SELECTIONS, but={"nsa"}))
def test_greedy_sampling_is_the_argmax_of_the_whole_sequence(name):
    model = build(name, key_conv=2)
    prompt = jax.random.randint(jax.random.key(0), (2, 18), 0, VOCABULARY)
    options = {"tokens": 4, "key": jax.random.key(0), "temperature": 0.0}
    chosen = jax.jit(lambda m, p: generate(m, p, **options))(model, prompt)
    whole = jnp.concatenate([prompt, chosen], 1)
    logits = jax.jit(lambda m, p: m.logits(m(p).value))(model, whole)
    np.testing.assert_array_equal(chosen, logits[:, 17:-1].argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dsa", "nsa"])
def test_computing_again_changes_no_gradient(name):
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, VOCABULARY)

    def slopes(remat):
        graph, state = nnx.split(build(name, remat=remat))

        def loss(state):
            hidden = nnx.merge(graph, state)(tokens)
            return jnp.square(hidden.value).mean() + sum(hidden.losses.values())

        return jax.jit(jax.grad(loss))(state)

    for a, b in zip(
        jax.tree.leaves(slopes("full")), jax.tree.leaves(slopes("none")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_some_layers_stay_dense():
    model = config("moba", depth=4, dense_every=2)
    chosen = [model.layer(n).attention.selector for n in range(4)]
    assert chosen == ["moba", None, "moba", None]
    assert list(attention_masks(model, 16)) == ["causal, layers 1, 3"]


def test_metrics_have_a_row_for_each_layer_that_selects():
    model = build("moba", depth=4, dense_every=2)
    metrics = model(jnp.zeros((1, 20), "int32")).metrics
    assert metrics["attention/density"].shape == (2,)


def counted(name, length, **attention):
    model = config(name, depth=1, **attention)
    shapes = nnx.eval_shape(lambda: Transformer(model, 30, rngs=nnx.Rngs(0)))
    return cost(model, nnx.state(shapes, nnx.Param), length=length)


def test_a_budget_of_everything_costs_what_dense_attention_does_and_the_choice():
    dense = counted(None, 32)
    every = counted("moba", 32, selection={"top": 8})
    choosing = 2 * 32 * sum(t // BLOCK for t in range(32)) / 32
    assert every.attention_density == 1.0
    assert every.useful_flops == pytest.approx(dense.useful_flops + choosing)


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_the_pairs_of_the_cost_are_those_of_the_masks(name):
    found = counted(name, 32).attention_density * (32 * 33 / 2)
    t = np.arange(32)
    blocks = np.minimum(t // BLOCK, 1) * BLOCK + t % BLOCK + 1
    expected = {
        "moba": blocks,
        "nsa": blocks + np.minimum(t + 1, 6) + np.maximum((t - 3) // 2 + 1, 0),
        "persistent_memory": t + 1 + 3,
        "routing": np.minimum(t // 3, 5) + 1,  # as if clusters were equally large
    }
    assert found == pytest.approx(expected.get(name, np.minimum(t + 1, 6)).sum())
