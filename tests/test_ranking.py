"""The best of rows, in passes, are those of ``lax.top_k``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import ranking


def scores(seed, columns, floor):
    """Whole numbers, so that many are equal, and some that are ``floor``."""
    drawn = jax.random.randint(jax.random.key(seed), (2, 3, columns), -4, 5)
    return jnp.where(drawn > 2, floor, drawn.astype("float32"))


@pytest.mark.parametrize("find", [ranking.best, ranking.top_k])
@given(seed=st.integers(0, 1000), floor=st.sampled_from([-jnp.inf, -1.0, 0.0]))
def test_ties_and_infinities_are_those_of_top_k(find, seed, floor):
    x = scores(seed, 12, floor)
    for k in (1, 5, 12):
        np.testing.assert_array_equal(find(x, k), jax.lax.top_k(x, k)[1])


def test_long_rows_too():
    x = scores(0, ranking.SHORT + 1, -jnp.inf)
    np.testing.assert_array_equal(ranking.top_k(x, 3), jax.lax.top_k(x, 3)[1])
