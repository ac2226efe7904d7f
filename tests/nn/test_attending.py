import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import AttentionConfig
from sparsejax.config import ConfigError
from sparsejax.nn.attending import attending
from sparsejax.nn.config import GatedConfig, ModelConfig
from sparsejax.nn.transformer import Transformer


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        depth=2,
        width=32,
        heads=4,
        kv_heads=2,
        attention=AttentionConfig(block_q=8, block_kv=8),
        ffn=GatedConfig(hidden=32),
    )
    return Transformer(config, 30, rngs=nnx.Rngs(0))


@jax.jit
def values(model):
    return model(jnp.arange(16, dtype=jnp.int32)[None] % 30).value


def test_a_window_changes_only_what_looks_past_it(model):
    near = attending(model, pattern="sliding_window", arguments={"window": 5})
    found, expected = np.asarray(values(near)), np.asarray(values(model))
    # float32, sums in another order
    np.testing.assert_allclose(found[:, :5], expected[:, :5], atol=1e-5)
    assert np.abs(found - expected)[:, 5:].max(axis=-1).min() > 1e-3


def test_the_parameters_are_shared(model):
    near = attending(model, pattern="sliding_window", arguments={"window": 5})
    assert near.embedding[...] is model.embedding[...]
    assert near.config.attention.pattern == "sliding_window"
    assert model.config.attention.pattern == "causal"


def test_a_change_that_needs_parameters_is_refused(model):
    with pytest.raises(ConfigError, match=r"learned_sinks.*needs other parameters"):
        attending(model, learned_sinks=True)
