"""A bias on the keys' logits: it can hide a key, and learns like any logit."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import BlockMask
from tests.attention.test_operation import MASKS, arrays, assert_equal_trees, both


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_bias_of_minus_infinity_hides_a_key(implementation, key):
    q, k, v = arrays(key)
    hidden = np.random.default_rng(0).random((2, 2, 1, 29)) < 0.5
    mask = np.tile(~hidden.repeat(2, 1), (1, 1, 22, 1))
    mask = BlockMask.from_dense(mask, block_q=4, block_kv=8)
    expected, slopes = both(q, k, v, mask, implementation="reference")
    bias = jnp.where(hidden[:, :, 0], -jnp.inf, 0)
    found, gradients = both(
        q, k, v, MASKS["full"](), bias=bias, implementation=implementation
    )
    assert_equal_trees((found, gradients[:3]), (expected, slopes[:3]))
    assert (gradients[3]["bias"][hidden[:, :, 0]] == 0).all()
