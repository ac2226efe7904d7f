"""The kernel of the search finds what the plain search does, in its interpreters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu
from sparsejax.memory import product_key_top_k
from sparsejax.memory.lookup import xla
from sparsejax.memory.lookup_tpu import mosaic_tpu

HEADS = 2


def halves(key, tokens, r):
    """Whole numbers, so that many sums are equal."""
    drawn = jax.random.randint(key, (2, HEADS, tokens, r), -9, 10)
    return drawn.astype("float32")


@pytest.mark.parametrize(
    ("tokens", "r", "k"), [(3, 5, 25), (130, 16, 4), (128, 8, 40), (7, 40, 16)]
)
def test_the_kernel_finds_the_pairs_of_the_plain_search(key, tokens, r, k):
    rows, columns = halves(key, tokens, r)
    with tpu.interpreted():
        found = jax.jit(mosaic_tpu, static_argnames="k")(rows, columns, k=k)
    np.testing.assert_array_equal(found, xla(rows, columns, k=k))


def test_the_kernel_reads_nothing_that_was_not_written(key):
    rows, columns = halves(key, 5, 12)
    with tpu.interpreted(simulated=True, uninitialized_memory="nan"):
        found = jax.jit(mosaic_tpu, static_argnames="k")(rows, columns, k=5)
        found.block_until_ready()
    np.testing.assert_array_equal(found, xla(rows, columns, k=5))


def test_a_lookup_by_the_kernel_has_the_same_scores_and_gradients(key):
    q_key, k_key = jax.random.split(key)
    given = (
        jax.random.normal(q_key, (9, HEADS, 8)),
        jax.random.normal(k_key, (HEADS, 2, 16, 4)),
    )

    def run(implementation):
        def found(queries, keys):
            hits = product_key_top_k(queries, keys, k=4, implementation=implementation)
            return jnp.sum(jnp.sin(hits.scores)), hits

        return jax.jit(jax.value_and_grad(found, (0, 1), has_aux=True))(*given)

    with tpu.interpreted():
        ours = run("mosaic_tpu")
    jax.tree.map(np.testing.assert_array_equal, ours, run("xla"))


def test_what_the_kernel_cannot_do_is_refused(key):
    rows, columns = halves(key, 3, 5)
    with pytest.raises(ValueError, match="needs a TPU"):
        mosaic_tpu(rows, columns, k=2)
    with pytest.raises(ValueError, match=r"k=129 .*use 'xla'"):
        mosaic_tpu(rows, columns, k=129)
    queries, keys = jnp.ones((1, 1, 2)), jnp.ones((1, 2, 1, 1))
    with pytest.raises(ValueError, match="did you mean 'xla'"):
        product_key_top_k(queries, keys, k=1, implementation="xlaa")
