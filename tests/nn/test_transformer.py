import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.memory import MemoryConfig
from sparsejax.moe import MoEConfig
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.transformer import Transformer

VOCABULARY = 50
CONFIG = ModelConfig(
    depth=2,
    width=32,
    heads=4,
    kv_heads=2,
    attention=AttentionConfig(
        pattern="streaming_llm",
        arguments={"sinks": 2, "window": 9},
        block_q=16,
        block_kv=16,
    ),
    ffn=MoEConfig(experts=4, per_token=2, hidden=16),
    memory=MemoryConfig(sub_keys=8, heads=2, per_head=4, key_width=8),
    memory_layers=(1,),
)


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, VOCABULARY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 32), 0, VOCABULARY)


@nnx.jit
def logits(model, tokens, segments=None, positions=None):
    hidden = model(tokens, segments=segments, positions=positions)
    return model.logits(hidden.value)


def test_a_token_is_not_seen_before_its_position(model, tokens):
    before = logits(model, tokens)
    after = logits(model, tokens.at[:, 20].set((tokens[:, 20] + 1) % VOCABULARY))
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert np.abs(before - after)[:, 20:, :VOCABULARY].max() > 0


def test_padding_of_the_vocabulary_scores_minus_infinity(model, tokens):
    scores = logits(model, tokens)
    assert scores.shape[-1] == 64
    assert np.isneginf(scores[..., VOCABULARY:]).all()
    assert np.isfinite(scores[..., :VOCABULARY]).all()


def test_metrics_come_in_the_order_of_the_layers(tokens):
    deep = dataclasses.replace(CONFIG, depth=3)
    model = Transformer(deep, VOCABULARY, rngs=nnx.Rngs(0))
    hidden = model(tokens)
    assert hidden.metrics["moe/load"].shape == (2, 4)
    alone = Transformer(
        dataclasses.replace(CONFIG, depth=1, memory=None, memory_layers=()),
        VOCABULARY,
        rngs=nnx.Rngs(0),
    )
    alone.embedding, alone.stacks[0] = model.embedding, first_layer(model, alone)
    np.testing.assert_array_equal(
        hidden.metrics["moe/load"][0], alone(tokens).metrics["moe/load"][0]
    )


def first_layer(model, alone):
    state = jax.tree.map(lambda x: x[:1], nnx.state(model.stacks[0]))
    return nnx.merge(nnx.graphdef(alone.stacks[0]), state)


def test_the_scan_equals_the_layers_one_by_one(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(32), (2, 32))
    x = model.embed(tokens)
    for stack in model.stacks:
        graph, state = nnx.split(stack.blocks[0])
        for layer in range(state["norm"]["scale"][...].shape[0]):
            one = jax.tree.map(lambda x, n=layer: x[n], state)
            block = nnx.merge(graph, one)
            output, _ = block(x, positions=positions, segments=None, cache=None)
            x = output.value
    np.testing.assert_allclose(model(tokens).value, model.norm(x), atol=2e-5)


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other(tokens):
    segments = jnp.where(jnp.arange(32) < 12, 1, 2)
    segments = jnp.broadcast_to(segments, (2, 32))
    positions = jnp.where(jnp.arange(32) < 12, jnp.arange(32), jnp.arange(32) - 12)
    positions = jnp.broadcast_to(positions, (2, 32))
    window = AttentionConfig(
        pattern="sliding_window", arguments={"window": 9}, block_q=16, block_kv=16
    )
    config = dataclasses.replace(CONFIG, attention=window)
    # Sinks are the first tokens of a row, which a second document does not have.
    model = Transformer(config, VOCABULARY, rngs=nnx.Rngs(0))
    packed = logits(model, tokens, segments, positions)
    first, second = logits(model, tokens[:, :12]), logits(model, tokens[:, 12:])
    np.testing.assert_allclose(packed[:, :12], first, atol=2e-5)
    np.testing.assert_allclose(packed[:, 12:], second, atol=2e-5)


def test_cached_prefill_and_decode_equal_the_whole(model, tokens):
    whole = logits(model, tokens)
    step = nnx.jit(lambda model, x, caches: model(x, caches=caches))
    hidden = step(model, tokens[:, :24], model.empty_caches(2, 32))
    parts = [model.logits(hidden.value)]
    for at in range(24, 28):
        hidden = step(model, tokens[:, at : at + 1], hidden.caches)
        parts.append(model.logits(hidden.value))
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole[:, :28], atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "names"])
def test_recomputing_changes_no_gradient(model, tokens, remat):
    def gradient(config):
        twin = Transformer(config, VOCABULARY, rngs=nnx.Rngs(0))
        graph, params = nnx.split(twin)
        value = lambda p: jnp.mean(nnx.merge(graph, p)(tokens).value ** 2)  # noqa: E731
        return jax.jit(jax.grad(value))(params)

    plain = gradient(CONFIG)
    again = gradient(dataclasses.replace(CONFIG, remat=remat))
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_near_float32(model, tokens):
    half = Transformer(
        dataclasses.replace(CONFIG, dtype="bfloat16", ffn=GatedConfig(hidden=32)),
        VOCABULARY,
        rngs=nnx.Rngs(0),
    )
    full = Transformer(
        dataclasses.replace(CONFIG, ffn=GatedConfig(hidden=32)),
        VOCABULARY,
        rngs=nnx.Rngs(0),
    )
    low, high = half(tokens).value, full(tokens).value
    assert low.dtype == jnp.bfloat16
    # Eight bits of mantissa over two layers: a few per cent of the RMS, which is 1.
    assert np.sqrt(np.mean((low.astype(jnp.float32) - high) ** 2)) < 0.05


def test_an_untied_model_has_a_table_of_its_own(tokens):
    config = dataclasses.replace(
        CONFIG, tied=False, depth=1, memory=None, memory_layers=()
    )
    model = Transformer(config, VOCABULARY, rngs=nnx.Rngs(0))
    assert model.unembedding.axes == "d v"
    assert model.logits(model(tokens).value).shape == (2, 32, 64)


def test_letters_of_a_stacked_parameter_begin_with_l(model):
    state = nnx.state(model.stacks[0], nnx.Param)
    letters = {
        x.axes.split()[0]
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    }
    assert letters == {"l"}
