from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.memory import MemoryConfig, PEERConfig
from sparsejax.moe import MoEConfig
from sparsejax.nn import reading
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.reading import look, read, values_of
from sparsejax.nn.transformer import Transformer

VOCABULARY, ROWS, LENGTH = 50, 2, 16
LOOKUP = {"sub_keys": 8, "heads": 2, "per_head": 4, "key_width": 8}


def model_of(**fields):
    config = ModelConfig(
        depth=2,
        width=32,
        heads=2,
        kv_heads=2,
        attention=AttentionConfig(pattern="causal", block_q=16, block_kv=16),
        ffn=fields.pop("ffn", GatedConfig(hidden=24)),
        memory_layers=(1,) if "memory" in fields else (),
        **fields,
    )
    return Transformer(config, VOCABULARY, rngs=nnx.Rngs(0))


MODELS = {  # each with a dense layer before the memory
    "product_key": {"memory": MemoryConfig(value_width=16, **LOOKUP)},
    "peer": {"memory": PEERConfig(**LOOKUP)},
}


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, VOCABULARY)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", MODELS)
def test_a_look_is_the_models_own_forward_in_parts(name, tokens):
    model = model_of(**MODELS[name])
    looks = look(model, tokens)
    for seen, values in zip(looks, values_of(model), strict=True):
        summed = jnp.einsum("btf,fd->btd", seen.coefficients, values)
        np.testing.assert_allclose(seen.added, summed, atol=2e-5)
        np.testing.assert_allclose(seen.after, seen.before + seen.added, atol=1e-6)
    own = model(tokens).value
    np.testing.assert_allclose(model.norm(looks[-1].after), own, atol=2e-5)


def test_vectors_are_asked_a_tile_at_a_time(key, monkeypatch):
    monkeypatch.setattr(reading, "TILE", 16)
    model, vectors = model_of(), jax.random.normal(key, (40, 32))
    ask = partial(reading.first_choices, model)
    expected = model.logits(vectors[None])[0].argmax(-1)
    np.testing.assert_array_equal(ask(vectors), expected)
    assert "40,64]" not in str(jax.make_jaxpr(ask)(vectors))  # ids are padded to 64


def planted(model, given, then):
    """Make the last layer's first key fire on one token and its value say another."""
    layer = model.stacks[0].blocks[0].ffn
    probe = model.embedding[...][given]
    for weight in (layer.gate, layer.up):
        weight[...] = weight[...].at[1, :, 0].set(100 * probe)
    layer.down[...] = layer.down[...].at[1, 0].set(100 * model.embedding[...][then])


def batches(tokens):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    for rows in (tokens, tokens[::-1]):
        yield rows, jnp.ones_like(rows), positions


def test_a_planted_memory_is_found():
    model = model_of()
    row = jnp.arange(LENGTH)
    tokens = jnp.stack([row, row + 20])
    planted(model, given=5, then=6)
    first, last = read(model, batches(tokens), top=4)
    assert last.said[0] == 6
    # The text twice, rows in turn: place 5 and, in the second batch's second row, 5.
    assert sorted(last.triggers.places[0, :2].tolist()) == [5, 3 * LENGTH + 5]
    assert 0 < last.agreement <= 1
    for layer in (first, last):
        assert 0 < layer.active < 1
        assert layer.triggered == 1
        assert 0 <= layer.composed <= 1
        assert 0 <= layer.changed <= 1


def test_a_documents_last_token_triggers_nothing():
    model = model_of()
    tokens = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    segments = jnp.repeat(jnp.array([1, 2, 0], "int32"), jnp.array([8, 4, 4]))
    segments = jnp.broadcast_to(segments, tokens.shape)  # 0 is padding
    positions = jnp.broadcast_to(jnp.arange(LENGTH) % 8, tokens.shape)
    (_, last) = read(model, [(tokens, segments, positions)], top=ROWS * LENGTH)
    places = np.unique(np.asarray(last.triggers.places))
    assert set(places % LENGTH) - {-1 % LENGTH} == {*range(7), 8, 9, 10}


def test_layers_that_are_no_sum_of_values_are_refused(tokens):
    routed = model_of(ffn=MoEConfig(experts=4, per_token=2, hidden=16))
    with pytest.raises(ValueError, match="MoE: it is no sum of fixed values; read"):
        look(routed, tokens)
    gated = model_of(memory=MemoryConfig(gate="swilu", **LOOKUP))
    with pytest.raises(ValueError, match="gate='swilu': what a slot adds depends"):
        values_of(gated)
    with pytest.raises(ValueError, match="batches is empty"):
        read(model_of(), [])
