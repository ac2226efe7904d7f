"""Product-key lookup against all r * r sums, sorted by NumPy."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.memory.lookup import product_key_top_k

SHAPES = [(1, 1), (3, 2), (5, 25), (8, 1), (8, 7), (8, 40), (16, 64)]  # (r, k)
TOKENS, HEADS = 3, 2

lookup = jax.jit(product_key_top_k, static_argnames="k")


def brute_force(rows, columns, k):
    """Ids and sums of the best pairs of ``[n, h, r]`` halves; ties to the lower id."""
    sums = (rows[..., :, None] + columns[..., None, :]).reshape(*rows.shape[:2], -1)
    ids = np.argsort(-sums, axis=-1, kind="stable")[..., :k]
    return ids, np.take_along_axis(sums, ids, -1)


def lookup_of_scores(rows, columns, k):
    """Make half scores the queries, and unit vectors the sub-keys."""
    r = rows.shape[-1]
    keys = jnp.broadcast_to(jnp.eye(r), (rows.shape[1], 2, r, r))
    queries = jnp.concatenate([rows, columns], -1)
    return lookup(queries, keys, k=k)


def halves(r, elements):
    scores = hnp.arrays(np.float32, (TOKENS, HEADS, r), elements=elements)
    return st.tuples(scores, scores)


def check(rows, columns, k):
    hits = lookup_of_scores(rows, columns, k)
    ids, scores = brute_force(rows, columns, k)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_array_equal(hits.scores, scores)


@pytest.mark.parametrize(("r", "k"), SHAPES)
@given(data=st.data())
def test_lookup_is_brute_force_with_heavy_ties(r, k, data):
    check(*data.draw(halves(r, st.integers(-2, 2).map(float))), k)


@pytest.mark.parametrize(("r", "k"), SHAPES)
@given(data=st.data())
def test_lookup_is_brute_force_on_any_sums_that_float32_holds(r, k, data):
    eighths = st.integers(-(2**20), 2**20).map(lambda x: x / 8)
    check(*data.draw(halves(r, eighths)), k)


@pytest.mark.parametrize(("r", "k"), SHAPES)
@given(data=st.data())
def test_lookup_has_the_scores_of_brute_force_even_where_sums_round(r, k, data):
    rows, columns = data.draw(halves(r, st.floats(-1e4, 1e4, width=16)))
    hits = lookup_of_scores(rows, columns, k)
    np.testing.assert_array_equal(hits.scores, brute_force(rows, columns, k)[1])


@pytest.mark.parametrize(("r", "k"), [(32, 64), (64, 32)])
def test_lookup_is_brute_force_on_random_queries_and_keys(r, k, key):
    q_key, k_key = jax.random.split(key)
    queries = jax.random.normal(q_key, (40, HEADS, 12))
    keys = jax.random.normal(k_key, (HEADS, 2, r, 6))
    hits = lookup(queries, keys, k=k)
    full = jnp.concatenate(
        [jnp.repeat(keys[:, 0], r, axis=1), jnp.tile(keys[:, 1], (1, r, 1))], -1
    )  # slot i * r + j has sub-keys i and j
    flat = np.einsum("nhc,hmc->nhm", np.float64(queries), np.float64(full))
    np.testing.assert_array_equal(hits.ids, np.argsort(-flat)[..., :k])
    np.testing.assert_allclose(hits.scores, -np.sort(-flat)[..., :k], atol=1e-5)


def test_minus_zero_ties_with_zero():
    rows = np.array([[[-0.0, 0.0, -0.0]]], np.float32)
    hits = lookup_of_scores(rows, rows, 4)
    np.testing.assert_array_equal(hits.ids, [[[0, 1, 2, 3]]])


def test_best_slots_do_not_depend_on_k(key):
    rows, columns = jax.random.normal(key, (2, TOKENS, HEADS, 8))
    everything = lookup_of_scores(rows, columns, 64).ids
    for k in (1, 8, 9, 33):
        best = lookup_of_scores(rows, columns, k).ids
        np.testing.assert_array_equal(best, everything[..., :k])


def test_everything_is_found_once_if_k_is_the_number_of_slots(key):
    rows, columns = jax.random.normal(key, (2, TOKENS, HEADS, 5))
    ids = lookup_of_scores(rows, columns, 25).ids
    np.testing.assert_array_equal(np.sort(ids), np.broadcast_to(range(25), ids.shape))


def test_score_gradients_are_those_of_the_chosen_products(key):
    q_key, k_key, w_key = jax.random.split(key, 3)
    queries = jax.random.normal(q_key, (5, HEADS, 8))
    keys = jax.random.normal(k_key, (HEADS, 2, 6, 4))
    # A score of exactly zero has a gradient too.
    queries, keys = queries.at[0].set(0), keys.at[:, 0, 2].set(0)
    weights = jax.random.normal(w_key, (5, HEADS, 7))
    ids = jax.jit(lambda q, s: product_key_top_k(q, s, k=7).ids)(queries, keys)
    heads = np.arange(HEADS)[None, :, None]

    def dense(queries, keys):
        chosen = [keys[heads, 0, ids // 6], keys[heads, 1, ids % 6]]
        full = jnp.concatenate(chosen, -1)
        return (jnp.einsum("nhc,nhkc->nhk", queries, full) * weights).sum()

    def fast(queries, keys):
        return (product_key_top_k(queries, keys, k=7).scores * weights).sum()

    for a, b in zip(
        jax.jit(jax.grad(fast, (0, 1)))(queries, keys),
        jax.jit(jax.grad(dense, (0, 1)))(queries, keys),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_scores_of_bfloat16_operands_accumulate_in_float32(key):
    q_key, k_key = jax.random.split(key)
    queries = jax.random.normal(q_key, (9, HEADS, 64), jnp.bfloat16)
    keys = jax.random.normal(k_key, (HEADS, 2, 8, 32), jnp.bfloat16)
    hits = lookup(queries, keys, k=4)
    wide = lookup(queries.astype("float32"), keys.astype("float32"), k=4)
    assert hits.scores.dtype == jnp.float32
    np.testing.assert_allclose(hits.scores, wide.scores, rtol=1e-5, atol=1e-5)


def test_no_tokens_have_no_hits():
    hits = product_key_top_k(jnp.zeros((0, 2, 4)), jnp.zeros((2, 2, 3, 2)), k=5)
    assert hits.ids.shape == hits.scores.shape == (0, 2, 5)


def test_pairs_compared_grow_as_k_log_k():
    hits = jax.make_jaxpr(lambda q, keys: product_key_top_k(q, keys, k=64))(
        jnp.zeros((1, 1, 2)), jnp.zeros((1, 2, 64, 1))
    )
    sort = next(e for e in hits.jaxpr.eqns if e.primitive.name == "sort")
    assert sort.invars[0].aval.size == 280  # of 64 * 64 = 4096 pairs


@pytest.mark.parametrize(
    ("queries", "keys", "k", "message"),
    [
        ((3, 2, 4), (2, 2, 5, 2), 26, r"k=26: must be in 1\.\.25"),
        ((3, 2, 4), (2, 2, 5, 2), 0, r"k=0: must be in 1\.\.25"),
        ((3, 2, 5), (2, 2, 5, 2), 1, "c even and twice the last axis"),
        (
            (3, 2, 2),
            (2, 2, 46341, 1),
            1,
            "r=46341 sub-keys: r . r slots must have int32",
        ),
    ],
)
def test_lookup_names_what_it_cannot_find(queries, keys, k, message):
    with pytest.raises(ValueError, match=message):
        product_key_top_k(jnp.zeros(queries), jnp.zeros(keys), k=k)


@pytest.mark.parametrize("keys", [(2, 5, 2), (1, 2, 5, 2), (2, 3, 5, 2), (2, 2, 5, 3)])
def test_keys_of_another_shape_are_refused(keys):
    with pytest.raises((ValueError, TypeError), match="keys"):
        product_key_top_k(jnp.zeros((3, 2, 4)), jnp.zeros(keys), k=1)


def test_what_rematerialisation_keeps_is_not_searched_again():
    queries = jax.random.normal(jax.random.key(0), (6, 2, 8))
    keys = jax.random.normal(jax.random.key(1), (2, 2, 8, 4))

    def searches(policy):
        def total(queries):
            return product_key_top_k(queries, keys, k=4).scores.sum()

        gradient = jax.grad(jax.checkpoint(total, policy=policy))
        return str(jax.make_jaxpr(gradient)(queries)).count("top_k")

    policies = jax.checkpoint_policies
    assert searches(policies.save_only_these_names("looked_up")) == 2
    assert searches(policies.nothing_saveable) == 4
