"""DMA: biases of the values, which choose and are learned."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.attention.selecting import (
    CLOSE,
    WIDTH,
    T,
    arrays,
    layer,
    positions,
    selected,
    value,
    with_weights_of,
)


def test_dma_begins_with_a_sliding_window(key):
    x = jax.random.normal(key, (2, T, WIDTH))
    window = {"pattern": "sliding_window", "arguments": {"window": 7}}
    dense = layer(None, **window)
    found = with_weights_of(layer("dma"), dense)
    np.testing.assert_allclose(value(found, x), value(dense, x), **CLOSE)


def test_dma_reads_the_keys_with_the_largest_bias(key):
    q, k, _ = arrays(key, b=1)
    mask = np.asarray(selected("dma", q, k).to_dense())[0]
    for head in range(4):
        bias = np.asarray(k).sum(-1)[0, :, head // 2]
        for t in (0, 5, 11, 23):
            best = np.argsort(-bias[: t + 1])[:6]
            assert set(np.flatnonzero(mask[head, t])) == set(best)


def test_dma_adds_its_bias_and_learns_by_it(key):
    x = jax.random.normal(key, (1, T, WIDTH))
    model = layer("dma", {"top": T})
    model.mixer.scale[...] = jnp.array([0.7, -0.4])
    q, k, v, _ = model._project(x, positions(1), None, None)
    steps = jnp.einsum("bsgc,gch->bhs", v, model.mixer.step[...])
    bias = jnp.array([0.7, -0.4])[None, :, None] * jax.nn.softplus(steps)
    logits = jnp.einsum("bthc,bshc->bhts", q, k.repeat(2, axis=2)) * 4**-0.5
    logits = logits + bias.repeat(2, axis=1)[:, :, None]
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), logits, -1e30))
    mixed = jnp.einsum("bhts,bshc->bthc", weights, v.repeat(2, axis=2))
    expected = jnp.einsum("bthc,hcd->btd", mixed, model.out[...])
    np.testing.assert_allclose(value(model, x), expected, **CLOSE)
    slope = nnx.grad(lambda m: jnp.square(value(m, x)).sum())(layer("dma"))
    assert jnp.abs(slope.mixer.scale[...]).min() > 0
