"""The convolution over keys: causal, by channel, the same in a cache."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import empty_cache
from sparsejax.attention.key_conv import key_conv
from tests.attention.selecting import (
    CLOSE,
    SIZES,
    WIDTH,
    T,
    layer,
    positions,
    run,
    value,
    with_weights_of,
)


def convolved(name=None, **changes):
    model = layer(name, key_conv=3, **changes)
    model.taps[...] = jax.random.normal(jax.random.key(1), model.taps.shape)
    return model


def test_a_key_convolution_begins_as_the_identity(key):
    x = jax.random.normal(key, (2, T, WIDTH))
    plain = layer("moba")
    found = with_weights_of(layer("moba", key_conv=3), plain)
    np.testing.assert_array_equal(value(found, x), value(plain, x))


def test_a_key_convolution_sees_the_last_keys_of_its_channel(key):
    k, taps = jax.random.normal(key, (1, 6, 2, 4)), jnp.arange(24.0).reshape(3, 2, 4)
    found = key_conv(k, taps, before=jnp.zeros((1, 2, 2, 4)))
    for t in range(6):
        total = sum(taps[lag] * k[0, t - lag] for lag in range(3) if lag <= t)
        np.testing.assert_allclose(found[0, t], k[0, t] + jax.nn.silu(total), **CLOSE)


@pytest.mark.few(1)
@pytest.mark.parametrize("steps", [[5, 18], [1, 2, 3, 20]])
def test_a_key_convolution_is_the_same_in_a_cache(steps, key):
    model, x = convolved("moba"), jax.random.normal(key, (2, T, WIDTH))
    cache = empty_cache(model.config, SIZES, 2, T, dtype="float32")
    parts, bounds = [], [0, *steps, T]
    for start, stop in itertools.pairwise(bounds):
        where = positions(2)[:, start:stop]
        out, cache = run(model, x[:, start:stop], where, None, cache)
        parts.append(out.value)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), value(model, x), **CLOSE)


def test_a_key_convolution_stays_within_its_document(key):
    model, x = convolved(), jax.random.normal(key, (1, T, WIDTH))
    numbers = jnp.where(jnp.arange(T) < 9, 1, 2)[None].astype("int32")
    before = value(model, x, segments=numbers)
    after = value(model, x.at[:, :9].add(1.0), segments=numbers)
    np.testing.assert_array_equal(after[:, 9:], before[:, 9:])
