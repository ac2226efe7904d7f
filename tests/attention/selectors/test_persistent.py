"""Persistent memory: keys that every query sees, in the same softmax."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.attention.selecting import CLOSE, WIDTH, T, layer, positions, value


def test_persistent_memory_is_keys_in_front_of_the_text(key):
    x = jax.random.normal(key, (1, T, WIDTH))
    window = {"pattern": "sliding_window", "arguments": {"window": 5}}
    model = layer("persistent_memory", {"slots": 3}, learned_sinks=True, **window)
    model.sinks[...] = jnp.array([-1.0, 0.0, 1.0, 2.0])
    q, k, v, _ = model._project(x, positions(1), None, None)
    k, v = (
        jnp.concatenate([scale**0.5 * p[...][None], y], 1).repeat(2, axis=2)
        for scale, p, y in (
            (4, model.mixer.keys, k),
            (3, model.mixer.values, v),
        )
    )
    i, j = np.arange(T)[:, None], np.arange(-3, T)[None]
    visible = (j < 0) | ((j <= i) & (j > i - 5))
    logits = jnp.einsum("bthc,bshc->bhts", q, k) * 4**-0.5
    logits = jnp.where(visible, logits, -jnp.inf)
    sinks = jnp.broadcast_to(model.sinks[...][None, :, None, None], (1, 4, T, 1))
    weights = jax.nn.softmax(jnp.concatenate([logits, sinks], -1))[..., :-1]
    mixed = jnp.einsum("bhts,bshc->bthc", weights, v)
    expected = jnp.einsum("bthc,hcd->btd", mixed, model.out[...])
    np.testing.assert_allclose(value(model, x), expected, **CLOSE)
