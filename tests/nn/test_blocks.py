import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.nn.blocks import GatedFeedForward, rms_norm
from sparsejax.nn.config import GatedConfig


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_rms_norm_leaves_a_root_mean_square_of_the_scale(shape, key):
    y = rms_norm(100 * jax.random.normal(key, shape), 3 * jnp.ones(8))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(y**2, -1)), 3.0, rtol=1e-4)


def test_rms_norm_of_zero_is_zero():
    np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 8)), jnp.ones(8)), 0)


def test_rms_norm_measures_in_float32(key):
    x = (jax.random.normal(key, (4, 512)) * 300).astype(jnp.bfloat16)
    exact = rms_norm(x.astype(jnp.float32), jnp.ones(512))
    # One rounding to bfloat16 at the end, nothing lost in the sum before it.
    np.testing.assert_allclose(
        rms_norm(x, jnp.ones(512)).astype(jnp.float32), exact, rtol=2**-8
    )


def test_gated_feed_forward_is_its_equation(key):
    layer = GatedFeedForward(
        GatedConfig(hidden=6, activation="silu"), 4, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(key, (2, 3, 4))
    gate, up, down = (
        np.asarray(w[...], np.float64) for w in (layer.gate, layer.up, layer.down)
    )
    z = np.asarray(x, np.float64)
    expected = (z @ gate / (1 + np.exp(-z @ gate)) * (z @ up)) @ down
    np.testing.assert_allclose(layer(x).value, expected, atol=1e-6)


def test_gated_feed_forward_scales_what_it_adds_to_the_stream():
    small = GatedFeedForward(
        GatedConfig(hidden=6), 4, init_scale=0.25, rngs=nnx.Rngs(0)
    )
    full = GatedFeedForward(GatedConfig(hidden=6), 4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(small.down[...], 0.25 * full.down[...], rtol=1e-6)
