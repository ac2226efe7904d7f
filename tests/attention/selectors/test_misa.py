"""MISA: few of the indexer's heads, and all of them again."""

import numpy as np
import pytest

from sparsejax.attention.selectors.misa import routed_heads
from sparsejax.config import FieldError
from tests.attention.selecting import (
    BLOCK,
    ROUTED,
    T,
    arrays,
    config,
    indexer,
    selected,
)


def test_misa_with_all_heads_is_dsa(key):
    q, k, _ = arrays(key)
    np.testing.assert_array_equal(
        selected("misa", q, k, routed=2).to_dense(), selected("dsa", q, k).to_dense()
    )


def test_misa_with_all_candidates_is_dsa(key):
    q, k, _ = arrays(key)
    expected = selected("dsa", q, k).to_dense()
    routed = selected("misa", q, k).to_dense()
    again = selected("misa", q, k, candidates=12).to_dense()
    every = selected("misa", q, k, candidates=T).to_dense()
    np.testing.assert_array_equal(every, expected)
    shares = [float((x & expected).sum() / expected.sum()) for x in (routed, again)]
    assert shares[0] < shares[1] < 1


def test_the_router_takes_the_heads_with_most_energy(key):
    q, k, _ = arrays(key)
    q, k, weights = indexer(q, k)
    few = {"routed": 1, "block": BLOCK}
    heads = routed_heads(q, k, weights=weights, **few)
    np.testing.assert_array_equal(
        heads, routed_heads(3 * q, k, weights=2 * weights, **few)
    )
    np.testing.assert_array_equal(heads, routed_heads(q, k, weights=-weights, **few))
    loud = routed_heads(q, k, weights=weights.at[..., 1].mul(1e9), **few)
    assert loud[:, 8:].mean() > 0.9  # but where that head's products are all negative
    means = np.asarray(k)[0, :20, 0].reshape(5, 4, 8).mean(1)
    products = np.maximum(np.asarray(q)[0, 23] @ means.T, 0)
    assert heads[0, 23, 0] == products.mean(1).argmax()


def test_misa_names_what_does_not_fit():
    with pytest.raises(FieldError, match=r"selection.routed=9: must be in 1..3"):
        config("misa", ROUTED | {"routed": 9})
    with pytest.raises(FieldError, match=r"selection.candidates=5: must be at least"):
        config("misa", ROUTED | {"top": 7, "candidates": 5})
