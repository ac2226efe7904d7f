"""Bags against dense products with one-hot matrices."""

from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.memory import tiles
from sparsejax.memory.bag import embedding_bag, row_products

M, D, N, K = 11, 6, 13, 4
SMALL = {"rtol": 1e-5, "atol": 1e-5}


def one_hot(ids):
    return jax.nn.one_hot(ids, M, dtype=jnp.float32)


def dense_bag(table, ids, weights):
    return jnp.einsum("nkm,nk,md->nd", one_hot(ids), weights, table)


def dense_products(table, ids, x):
    return jnp.einsum("nkm,md,nd->nk", one_hot(ids), table, x)


PAIRS = [
    pytest.param(embedding_bag, dense_bag, K, id="bag"),
    pytest.param(row_products, dense_products, D, id="products"),
]


def operands(key, width, dtype=jnp.float32):
    keys = jax.random.split(key, 3)
    table = jax.random.normal(keys[0], (M, D), dtype)
    ids = jax.random.randint(keys[1], (N, K), 0, M)
    return table, ids, jax.random.normal(keys[2], (N, width), dtype)


@partial(jax.jit, static_argnames=("function", "tile"))
def value_and_gradients(function, table, ids, other, tile=tiles.TILE):
    del tile  # set by monkeypatch; here it asks for a compilation of its own

    def loss(table, other):
        y = function(table, ids, other)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(table, other)
    return y, *gradients


def assert_same(fast, slow, table, ids, other, tile=tiles.TILE):
    for a, b in zip(
        value_and_gradients(fast, table, ids, other, tile),
        value_and_gradients(slow, table, ids, other),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, **SMALL)


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
@pytest.mark.parametrize("tile", [1, 3 * K * D, 2**20])
def test_any_tile_is_the_dense_product_with_gradients(
    fast, slow, width, tile, key, monkeypatch
):
    monkeypatch.setattr(tiles, "TILE", tile)
    assert_same(fast, slow, *operands(key, width), tile)


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
@given(ids=hnp.arrays(np.int32, (N, K), elements=st.integers(0, 2)))
def test_repeated_rows_count_every_time(fast, slow, width, ids):
    table, _, other = operands(jax.random.key(0), width)
    assert_same(fast, slow, table, jnp.asarray(ids), other)


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
def test_untouched_rows_are_never_read_and_have_zero_gradient(fast, slow, width, key):
    table, ids, other = operands(key, width)
    ids = 2 * (ids // 4)  # rows 0, 2, 4
    poisoned = table.at[jnp.array([1, 3, 5, 6, 7, 8, 9, 10])].set(jnp.nan)
    y, table_bar, other_bar = value_and_gradients(fast, poisoned, ids, other)
    assert np.isfinite(y).all()
    assert np.isfinite(other_bar).all()
    used = np.isin(np.arange(M), ids)
    assert (np.asarray(table_bar)[~used] == 0).all()
    assert (np.asarray(table_bar)[used] != 0).all()


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
def test_padding_of_the_last_tile_reads_nothing(fast, slow, width, key, monkeypatch):
    tile = 4 * K * D  # 13 tokens: the last tile has 1
    monkeypatch.setattr(tiles, "TILE", tile)
    table, ids, other = operands(key, width)
    poisoned = table.at[0].set(jnp.nan)  # what padding would name
    y, table_bar, _ = value_and_gradients(
        fast, poisoned, jnp.maximum(ids, 1), other, tile
    )
    assert np.isfinite(y).all()
    assert (np.asarray(table_bar)[0] == 0).all()


def test_no_tile_is_padding_alone(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 7 * K * D // 4)  # not quite two tokens
    program = str(jax.make_jaxpr(embedding_bag)(*operands(jax.random.key(0), K)))
    assert "length=7\n" in program  # for 13 tokens


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
def test_bfloat16_is_as_good_as_the_dense_product(fast, slow, width, key):
    table, ids, other = operands(key, width)
    exact = value_and_gradients(slow, table, ids, other)
    half = [table.astype(jnp.bfloat16), ids, other.astype(jnp.bfloat16)]
    ours = value_and_gradients(fast, *half)
    theirs = value_and_gradients(
        lambda *operands: slow(*operands).astype(jnp.bfloat16),
        half[0].astype(jnp.float32),
        ids,
        half[2].astype(jnp.float32),
    )
    for a, b, c, factor in zip(ours, theirs, exact, (2, 3, 3), strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.abs(np.float32(a) - c).max()
        bound = np.abs(np.float32(b) - c).max() + 2**-8 * np.abs(c).max()
        assert error <= factor * bound


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
def test_float32_weights_of_a_bfloat16_table_keep_their_dtype(fast, slow, width, key):
    table, ids, other = operands(key, width)
    y, table_bar, other_bar = value_and_gradients(
        fast, table.astype(jnp.bfloat16), ids, other
    )
    assert table_bar.dtype == jnp.bfloat16
    assert other_bar.dtype == jnp.float32
    assert y.dtype == (jnp.bfloat16 if fast is embedding_bag else jnp.float32)


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
def test_no_tokens_make_no_rows_and_a_zero_gradient(fast, slow, width, key):
    table = jax.random.normal(key, (M, D))
    ids, other = jnp.zeros((0, K), jnp.int32), jnp.zeros((0, width))
    y, table_bar, _ = value_and_gradients(fast, table, ids, other)
    assert y.shape == (0, D if width == K else K)
    assert not np.asarray(table_bar).any()


@pytest.mark.parametrize(("fast", "slow", "width"), PAIRS)
@pytest.mark.parametrize("bad", [M, -1])
def test_ids_out_of_range_read_nan_and_give_no_gradient(fast, slow, width, bad, key):
    table, ids, other = operands(key, width)
    ids = jnp.zeros_like(ids).at[0, 0].set(bad)
    with pytest.raises(ValueError, match=rf"ids from .*{bad}.*has the rows 0\.\."):
        fast(table, ids, other)

    @jax.jit
    def both(table, ids):
        y, pull = jax.vjp(lambda table: fast(table, ids, other), table)
        return y, pull(jnp.ones_like(y))

    y, (table_bar,) = both(table, ids)
    assert np.isnan(y[0]).any()
    assert np.isfinite(y[1:]).all()
    assert np.isfinite(table_bar).all()
    assert not np.asarray(table_bar)[1:].any()


@pytest.mark.parametrize(
    ("ids", "weights"), [((3, 2), (3, 4)), ((3, 2, 2), (3, 2, 2)), ((3,), (3,))]
)
def test_bag_refuses_other_shapes(ids, weights):
    with pytest.raises((ValueError, TypeError), match=r"ids|weights"):
        embedding_bag(jnp.zeros((M, D)), jnp.zeros(ids, jnp.int32), jnp.zeros(weights))


@pytest.mark.parametrize(("ids", "x"), [((3, 2), (4, D)), ((3, 2), (3, D + 1))])
def test_products_refuse_other_shapes(ids, x):
    with pytest.raises((ValueError, TypeError), match=r"ids|x"):
        row_products(jnp.zeros((M, D)), jnp.zeros(ids, jnp.int32), jnp.zeros(x))
