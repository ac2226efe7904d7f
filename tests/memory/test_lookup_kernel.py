"""The kernels of the search find what brute force does, in their interpreters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu, tpu
from sparsejax.memory import product_key_top_k
from sparsejax.memory.lookup import IMPLEMENTATIONS, xla
from tests.interpreters import GPU
from tests.memory.test_lookup import brute_force
from tests.slowly import slowly

HEADS = 2
SHAPES = [  # tokens, sub-keys of a half, slots of a token
    (3, 5, 25),
    (130, 16, 4),
    (128, 12, 64),
    (7, 40, 16),
    (2, 150, 20),
    (1, 2048, 64),
]
INTERPRETERS = {"mosaic_tpu": tpu.interpreted, "mosaic_gpu": gpu.interpreted}
runs = pytest.mark.parametrize("name", ["mosaic_tpu", GPU])


def halves(key, tokens, r):
    """Whole numbers, so that many sums are equal; some zeros are negative."""
    drawn = jax.random.randint(key, (2, HEADS, tokens, r), -9, 10)
    return drawn.astype("float32").at[..., ::2].multiply(-1)


def search(name, rows, columns, k, **options):
    with INTERPRETERS[name](**options):
        find = jax.jit(partial(IMPLEMENTATIONS[name], k=k))
        return jax.block_until_ready(find(rows, columns))


@runs
@pytest.mark.parametrize(("tokens", "r", "k"), slowly(SHAPES, but=SHAPES[:-1]))
def test_kernels_find_the_pairs_of_brute_force(key, name, tokens, r, k):
    rows, columns = halves(key, tokens, r)
    found = search(name, rows, columns, k)
    np.testing.assert_array_equal(found, brute_force(rows, columns, k)[0])
    np.testing.assert_array_equal(found, xla(rows, columns, k=k))


def test_the_kernel_for_tpus_reads_nothing_that_was_not_written(key):
    # The interpreter of the other always fills memory with NaN, and looks for races.
    rows, columns = halves(key, 5, 12)
    options = {"simulated": True, "uninitialized_memory": "nan"}
    found = search("mosaic_tpu", rows, columns, 5, **options)
    np.testing.assert_array_equal(found, xla(rows, columns, k=5))


@runs
def test_a_lookup_by_a_kernel_has_the_same_scores_and_gradients(key, name):
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

    with INTERPRETERS[name]():
        ours = jax.block_until_ready(run(name))
    jax.tree.map(np.testing.assert_array_equal, ours, run("xla"))


@pytest.mark.parametrize(
    ("name", "k", "words"),
    [
        ("mosaic_tpu", 2, "needs a TPU"),
        ("mosaic_tpu", 129, r"k=129 .*use 'xla'"),
        ("mosaic_gpu", 2, "on cpu .*needs a Hopper GPU"),
        ("mosaic_gpu", 65, "k=65: .* up to 64 slots; use 'xla'"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(key, name, k, words):
    with pytest.raises(ValueError, match=words):
        IMPLEMENTATIONS[name](*halves(key, 3, 20), k=k)


def test_a_search_that_is_none_is_refused():
    queries, keys = jnp.ones((1, 1, 2)), jnp.ones((1, 2, 1, 1))
    with pytest.raises(ValueError, match="did you mean 'xla'"):
        product_key_top_k(queries, keys, k=1, implementation="xlaa")
