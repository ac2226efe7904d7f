"""Values may have another width than queries and keys, under every implementation."""

import functools
import importlib

import jax
import numpy as np
import pytest

from sparsejax.attention import block_sparse_attention
from tests.attention.test_mosaic_tpu import run
from tests.attention.test_operation import (
    CLOSE,
    MASKS,
    PATHS,
    arrays,
    assert_equal_trees,
    both,
    dense,
)

# The package's attribute of that name is the function.
xla = importlib.import_module("sparsejax.attention.xla")


@functools.cache
def narrow():
    """Arrays whose values have five channels of eight, and the dense answer."""
    q, k, v = arrays(jax.random.key(3))
    x = q, k, v[..., :5]
    return x, both(*x, MASKS["causal"](), implementation="dense")


@pytest.mark.parametrize("path", sorted(PATHS))
def test_values_may_be_narrower_than_keys(path, monkeypatch):
    monkeypatch.setattr(xla, "path", lambda _: PATHS[path])
    monkeypatch.setattr(xla, "suited", lambda mask: mask)
    x, expected = narrow()
    found = both(*x, MASKS["causal"](), implementation="xla")
    assert found[0].values.shape == (2, 22, 4, 5)
    assert_equal_trees(found, expected)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_values_may_be_wider_than_keys(implementation):
    q, k, v = arrays(jax.random.key(3))
    q, k, mask = q[..., :6], k[..., :6], MASKS["causal"]()
    found = block_sparse_attention(q, k, v, mask, implementation=implementation)
    np.testing.assert_allclose(found, dense(q, k, v, mask).values, **CLOSE)


@pytest.mark.slow
def test_the_kernels_pad_narrower_values_and_cut_the_answer():
    x, expected = narrow()
    assert_equal_trees(run(*x, MASKS["causal"]()), expected)
