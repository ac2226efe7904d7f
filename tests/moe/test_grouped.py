"""grouped_matmul: every implementation against one masked product per group."""

import itertools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jaxtyping import TypeCheckError

from sparsejax.moe import grouped_matmul

ROWS, WIDTH, HIDDEN, GROUPS = 420, 8, 6, 4
SIZES = (290, 1, 33, 64)  # wide and narrow tiles, one row, exact tiles; a tail is left


@jax.jit
def operands(key):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (ROWS, WIDTH))
    w = jax.random.normal(keys[1], (GROUPS, WIDTH, HIDDEN))
    return x, w, jax.random.normal(keys[2], (ROWS, HIDDEN))


def value_and_gradients(implementation):
    @jax.jit
    def run(x, w, dy, sizes):
        y, vjp = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation),
            x,
            w,
        )
        return y, *vjp(dy)

    return run


SLOW, FAST = value_and_gradients("reference"), value_and_gradients("xla")


def assert_equal(x, w, dy, sizes):
    sizes = jnp.asarray(sizes, jnp.int32)
    for fast, slow in zip(FAST(x, w, dy, sizes), SLOW(x, w, dy, sizes), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-4)  # sums of 290


def test_reference_is_a_loop_over_rows(key):
    x, w, dy = operands(key)
    group = np.repeat(np.arange(GROUPS), SIZES)
    rows = [np.float64(x[i]) @ np.float64(w[g]) for i, g in enumerate(group)]
    y, _, _ = SLOW(x, w, dy, jnp.asarray(SIZES, jnp.int32))
    np.testing.assert_allclose(y[: len(group)], rows, rtol=1e-5, atol=1e-5)
    assert not y[len(group) :].any()


@pytest.mark.parametrize("live", [*itertools.product((0, 1), repeat=GROUPS)], ids=str)
def test_empty_groups_give_zero_and_the_others_do_not_notice(key, live):
    x, w, dy = operands(key)
    sizes = np.multiply(SIZES, live)
    assert_equal(x, w, dy, sizes)
    _, _, dw = FAST(x, w, dy, jnp.asarray(sizes, jnp.int32))
    assert not dw[sizes == 0].any()
    assert all(dw[g].any() for g in np.flatnonzero(sizes))


@given(cuts=st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
def test_any_sizes_agree_with_the_reference(cuts):
    assert_equal(*operands(jax.random.key(0)), np.diff(sorted(cuts), prepend=0))


def test_rows_past_the_groups_are_zero_whatever_they_hold(key):
    x, w, dy = operands(key)
    sizes, used = jnp.asarray(SIZES, jnp.int32), sum(SIZES)
    clean = FAST(x, w, dy, sizes)
    poisoned = FAST(x.at[used:].set(jnp.nan), w, dy.at[used:].set(jnp.nan), sizes)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not poisoned[0][used:].any()
    assert not poisoned[1][used:].any()


def test_a_poisoned_group_does_not_touch_its_neighbours(key):
    x, w, dy = operands(key)
    sizes = jnp.asarray(SIZES, jnp.int32)
    y, dx, dw = FAST(x.at[:290].set(jnp.nan), w, dy, sizes)
    assert all(jnp.isfinite(a).all() for a in (y[290:], dx, dw[1:]))


def test_gradients_are_products_of_what_is_there_and_of_no_transposed_copy(key):
    sizes = jnp.asarray(SIZES, jnp.int32)
    compiled = FAST.lower(*operands(key), sizes).compile().as_text()
    assert not re.findall(r"= f32\[\d.*? (?:copy|transpose)\(", compiled)
    x, w, _ = operands(key)
    turned = jax.jit(lambda x, w: (w.transpose(0, 2, 1) * 2, x.T + 1))
    assert "transpose(" in turned.lower(x, w).compile().as_text()


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_few_rows_agree_with_the_reference(key, rows):
    x, w, dy = operands(key)
    assert_equal(x[:rows], w, dy[:rows], [0, rows, 0, 0])


def test_bfloat16_is_as_good_as_a_dense_product_in_bfloat16(key):
    x, w, dy = operands(key)
    low = [a.astype(jnp.bfloat16) for a in (x, w, dy)]
    exact = SLOW(*(a.astype(jnp.float32) for a in low), jnp.asarray(SIZES, jnp.int32))
    for a, b in zip(FAST(*low, jnp.asarray(SIZES, jnp.int32)), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # Accumulated in float32, so one rounding of the result, 2**-9, remains.
        assert jnp.abs(a.astype(jnp.float32) - b).max() <= 2**-8 * jnp.abs(b).max()


def test_unknown_implementations_are_named(key):
    x, w, _ = operands(key)
    with pytest.raises(ValueError, match=r"'xlaa'.*did you mean 'xla'"):
        grouped_matmul(x, w, jnp.zeros(GROUPS, jnp.int32), implementation="xlaa")


def test_group_sizes_of_the_wrong_length_are_refused(key):
    x, w, _ = operands(key)
    sizes = jnp.zeros(GROUPS + 1, jnp.int32)
    with pytest.raises(TypeCheckError, match="group_sizes"):
        grouped_matmul(x, w, sizes)
    with pytest.raises(ValueError, match=r"group_sizes.*one entry for each of the 4"):
        grouped_matmul.__wrapped__(x, w, sizes)


def test_a_weight_of_another_dtype_is_refused(key):
    x, w, _ = operands(key)
    with pytest.raises(ValueError, match=r"cast the weights to x.dtype"):
        grouped_matmul(x.astype(jnp.bfloat16), w, jnp.zeros(GROUPS, jnp.int32))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, -2, 3, 0), r"group_sizes\[1\]=-2: a group has 0 rows or more"),
        ((400, 10, 10, 1), "add up to 421: x has only 420 rows"),
        ((2**31 - 1, 2**31 - 1, 4, 0), "add up to 4294967298"),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sizes_that_cannot_be_are_refused(key, sizes, words, implementation):
    x, w, _ = operands(key)
    sizes = jnp.asarray(sizes, jnp.int32)
    with pytest.raises(ValueError, match=words):
        grouped_matmul(x, w, sizes, implementation=implementation)


@pytest.mark.parametrize(
    ("sizes", "meant"),
    [
        ((10, -2, 30, 0), (10, 0, 30, 0)),
        ((400, 10, 20, 5), (400, 10, 10, 0)),
        ((2**31 - 1, 2**31 - 1, 2**31 - 1, 7), (420, 0, 0, 0)),
        ((0, 2**31 - 1, 0, 7), (0, 420, 0, 0)),
    ],
)
def test_traced_sizes_that_cannot_be_are_cut_to_the_rows(key, sizes, meant):
    arrays = operands(key)
    sizes, meant = (jnp.asarray(n, jnp.int32) for n in (sizes, meant))
    for run in (SLOW, FAST):
        for a, b in zip(run(*arrays, sizes), run(*arrays, meant), strict=True):
            np.testing.assert_array_equal(a, b)
