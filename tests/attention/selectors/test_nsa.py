"""NSA: three branches, each of which can be dense attention."""

import jax
import numpy as np
import pytest

from sparsejax.config import FieldError
from tests.attention.selecting import (
    CLOSE,
    SOME,
    WIDTH,
    T,
    arrays,
    config,
    gated,
    layer,
    selected,
    value,
    with_weights_of,
)


@pytest.mark.parametrize(
    ("gates", "changes"),
    [((0, 0, 1), {"window": T}), ((1, 0, 0), {"length": 1, "stride": 1})],
)
def test_nsa_branches_become_dense_attention(gates, changes, key):
    x = jax.random.normal(key, (2, T, WIDTH))
    model = gated(layer("nsa", SOME["nsa"] | changes), *gates)
    dense = with_weights_of(layer(None), model)
    dense.key[...] = model.mixer.keys[...][gates.index(1) // 2]
    dense.value[...] = model.mixer.values[...][gates.index(1) // 2]
    np.testing.assert_allclose(value(model, x), value(dense, x), **CLOSE)


def test_nsa_compresses_only_what_is_complete(key):
    x = jax.random.normal(key, (1, T, WIDTH))
    out = value(gated(layer("nsa"), 1, 0, 0), x)
    assert (out[:, :3] == 0).all()
    assert (out[:, 3:] != 0).any(-1).all()


def test_nsa_chooses_by_the_mass_of_compressed_keys(key):
    q, k, _ = arrays(key, b=1)
    kinds = np.asarray(selected("nsa", q, k, top=4).kinds())[0] > 0
    np.testing.assert_array_equal(kinds[::2], kinds[1::2])  # a group is of one mind
    pooled = np.stack([k[0, m : m + 4].mean(0) for m in range(0, T - 3, 2)], 1)
    for t in (9, 16, 23):
        mass = np.zeros(6)
        for head in (0, 1):
            logits = pooled[0] @ np.asarray(q)[0, t, head] * 8**-0.5
            seen = 2 * np.arange(11) + 3 <= t
            weights = np.exp(logits - logits.max()) * seen
            weights = np.append(weights / weights.sum(), [0, 0])
            for j in range(6):  # two steps of the stride in a block, two in a key
                each = [(2 * j + m - n) for m in (0, 1) for n in (0, 1)]
                mass[j] += sum(weights[x] for x in each if 0 <= x < 11)
        own = t // 4
        order = [j for j in np.argsort(-mass) if 0 < j < own]
        assert set(np.flatnonzero(kinds[0, t])) == {0, own, *order[:2]}


def test_nsa_asks_for_room_for_its_forced_blocks():
    with pytest.raises(FieldError, match=r"selection.top=2: must hold the forced"):
        config("nsa", {"top": 2})
    with pytest.raises(FieldError, match="length=33: must be a multiple of stride=16"):
        config("nsa", {"length": 33})
