"""MoBA: the own block and the best earlier ones, by the means of their keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu import interpreted
from sparsejax.attention import Segments
from sparsejax.attention.context import Place
from tests.attention.selecting import (
    CLOSE,
    SOME,
    WIDTH,
    T,
    arrays,
    layer,
    selected,
    value,
)


def test_moba_reads_its_own_block_and_the_best_means(key):
    q, k, _ = arrays(key, b=1, h=1, g=1)
    mask = np.asarray(selected("moba", q, k, top=3).kinds())[0, 0] > 0
    means = np.asarray(k)[0, :, 0].reshape(6, 4, 8).mean(1)
    for t in range(T):
        own = t // 4
        order = np.argsort(-means[:own] @ np.asarray(q)[0, t, 0])
        assert set(np.flatnonzero(mask[t])) == {own, *order[:2]}


def test_moba_never_reads_the_mean_of_its_own_block(key):
    q, k, _ = arrays(key, b=1)
    before = selected("moba", q, k).to_dense()
    after = selected("moba", q, k.at[:, 20:].add(9.0)).to_dense()
    np.testing.assert_array_equal(after, before)


def test_documents_in_a_block_have_means_of_their_own(key):
    q, k, _ = arrays(key, b=1)
    numbers = jnp.where(jnp.arange(T) < 6, 1, 2)[None].astype("int32")
    place = Place(segments=Segments(numbers, numbers))
    before = selected("moba", q, k, place=place).to_dense()
    after = selected("moba", q, k.at[:, 4:6].add(9.0), place=place).to_dense()
    np.testing.assert_array_equal(after, before)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["moba", "dsa"])
def test_kernels_take_the_lists_of_queries_in_larger_blocks(name, key):
    x = jax.random.normal(key, (1, T, WIDTH))
    blocks = {"block_q": 8, "block_kv": 8}
    selection = SOME[name] | ({"top": 2} if name == "moba" else {})
    expected = value(layer(name, selection, **blocks), x)
    with interpreted():
        found = value(layer(name, selection, implementation="mosaic_tpu", **blocks), x)
    np.testing.assert_allclose(found, expected, **CLOSE)
