"""The gradient of a table as rows, and rules of rows, against the dense ones."""

from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.memory import lazy, rows
from sparsejax.memory.bag import embedding_bag, row_products
from sparsejax.memory.rows import row_gradient
from sparsejax.memory.table import Reads, Table, arm, join, part, reads, sink_of
from sparsejax.partition import MESH_AXES

L, M, D, N, K = 2, 8, 4, 8, 3
SMALL = {"rtol": 1e-5, "atol": 1e-5}
RATE = 0.1
DENSE = {
    "sgd": optax.sgd(RATE),
    "adagrad": optax.adagrad(RATE),
    "adam": optax.adam(RATE),
}
any_ids = hnp.arrays(np.int32, (N, K), elements=st.integers(-2, L * M + 2))


def spread(rows, slots):
    """Rows as an array of the table's shape; padding and ids outside fall away."""
    whole = np.zeros((slots + 1, D), np.float32)
    np.add.at(whole, np.minimum(rows.ids, slots), rows.values)
    return whole[:-1]


def some_reads(ids):
    keys = jax.random.split(jax.random.key(1))
    weights = jax.random.normal(keys[0], ids.shape)
    return Reads(jnp.asarray(ids), weights, jax.random.normal(keys[1], (len(ids), D)))


@partial(jax.jit, static_argnames="tile")
def summed(reads, tile=rows.TILE):
    del tile  # set by monkeypatch
    return row_gradient(reads, layers=L, slots=M)


def by_loops(reads):
    whole = np.zeros((L * M, D), np.float32)
    for ids, weights, vector in zip(*map(np.asarray, reads), strict=True):
        for row, weight in zip(ids, weights, strict=True):
            if 0 <= row < L * M:
                whole[row] += weight * vector
    return whole


@given(ids=any_ids)
def test_rows_are_distinct_ascending_and_the_sums_of_their_duplicates(ids):
    rows = summed(some_reads(ids))
    named = np.unique(ids[(ids >= 0) & (ids < L * M)])
    np.testing.assert_array_equal(rows.ids[: len(named)], named)
    assert (np.asarray(rows.ids)[len(named) :] == L * M).all()
    assert not np.asarray(rows.values)[len(named) :].any()
    np.testing.assert_allclose(spread(rows, L * M), by_loops(some_reads(ids)), **SMALL)


def test_rows_in_tiles_are_the_same_rows(key, monkeypatch):
    read = some_reads(jax.random.randint(key, (N, K), 0, L * M))
    monkeypatch.setattr(rows, "TILE", 5 * D)
    found = summed(read, 5 * D)
    assert len(found.ids) % 5 == 0
    np.testing.assert_allclose(spread(found, L * M), by_loops(read), **SMALL)


def test_no_reads_are_no_rows():
    rows = summed(some_reads(np.zeros((0, K), np.int32)))
    assert (np.asarray(rows.ids) == L * M).all()
    assert not np.asarray(rows.values).any()


def operands(key):
    keys = jax.random.split(key, 4)
    table = nnx.Param(jax.random.normal(keys[0], (L, M, D)), axes="l m d", reads=K)
    ids = jax.random.randint(keys[1], (L, N, K), 0, M)
    weights = jax.random.normal(keys[2], (L, N, K))
    return table, ids, weights, jax.random.normal(keys[3], (N, D))


def told_by(table, ids, weights, x, scale=None):
    """Rows, and gradients by weights and tokens; the table is read twice a layer."""

    def loss(sinks, weights, x):
        first, second = (arm(table, sink, scale).get_value() for sink in sinks)
        slim, held = part((first, second))

        def layer(x, of):
            tables, ids, weights = of
            down, up = join(tables, held)
            hidden = jnp.sin(row_products(down, ids, x)) * weights
            return x + embedding_bag(up, ids, hidden), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, (slim, ids, weights))
        return jnp.sum(jnp.sin(x))

    sinks = [sink_of(table, N)] * 2
    told, *others = jax.grad(loss, (0, 1, 2))(sinks, weights, x)
    both = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *(reads(table, x) for x in told)
    )
    return both, *others


def dense_gradients(table, ids, weights, x):
    def loss(rows, weights, x):
        def layer(x, of):
            rows, ids, weights = of
            hidden = jnp.sin(row_products(rows, ids, x)) * weights
            return x + embedding_bag(rows, ids, hidden), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, (rows, ids, weights))[0]))

    return jax.grad(loss, (0, 1, 2))(table, weights, x)


def test_sinks_tell_the_dense_gradient_through_scans_and_checkpoints(key):
    table, ids, weights, x = operands(key)
    expected = jax.jit(dense_gradients)(0.5 * table[...], ids, weights, x)
    half = jnp.float32(0.5)
    told, *others = jax.jit(told_by)(table, ids, weights, x, half)
    found = spread(summed(told), L * M).reshape(L, M, D)
    for a, b in zip((found, *others), expected, strict=True):
        np.testing.assert_allclose(a, b, **SMALL)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", sorted(lazy.RULES))
def test_a_mesh_moves_the_same_rows(name, key):
    table, *others = operands(key)
    kept = {k: x[...] for k, x in lazy.moments_of(name, table).items()}

    def step(rows, kept, *others):
        told = told_by(table.replace(rows), *others)[0]
        rows_of = row_gradient(told, layers=L, slots=M)
        move = lazy.Move(jnp.int32(1), jnp.float32(RATE), jnp.float32(0.5))
        return lazy.apply(lazy.RULES[name], rows, kept, rows_of, move)

    expected = jax.jit(step)(table[...], kept, *others)
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    with jax.set_mesh(jax.make_mesh((2, 2, 1, 2, 1), MESH_AXES, kinds)):
        found = jax.jit(step)(table[...], kept, *others)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )


@partial(jax.jit, static_argnames="name")
def lazily(name, table, moments, ids, step):
    rows = row_gradient(some_reads(ids), layers=L, slots=M)
    move = lazy.Move(step, jnp.float32(RATE), jnp.float32(1))
    return lazy.apply(lazy.RULES[name], table, moments, rows, move)[:2]


def both_ways(name, batches):
    """Train lazily and densely on the same reads: tables and moments."""
    start = jax.random.normal(jax.random.key(0), (L, M, D))
    param = nnx.Param(start, axes="l m d")
    table = start
    moments = {k: x[...] for k, x in lazy.moments_of(name, param).items()}
    dense, state = start, DENSE[name].init(start)
    for step, ids in enumerate(batches, start=1):
        table, moments = lazily(name, table, moments, ids, jnp.int32(step))
        gradient = jnp.asarray(by_loops(some_reads(ids)).reshape(L, M, D))
        with jax.numpy_dtype_promotion("standard"):
            moved, state = DENSE[name].update(gradient, state)
        dense = dense + moved
    return table, moments, dense, state


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
@given(batches=st.lists(any_ids, min_size=3, max_size=3))
def test_sgd_and_adagrad_are_the_dense_optimisers_whatever_is_read(name, batches):
    table, _, dense, _ = both_ways(name, batches)
    np.testing.assert_allclose(table, dense, **SMALL)


def test_adam_that_touches_every_row_is_the_dense_optimiser():
    every = np.arange(N * K, dtype=np.int32).reshape(N, K) % (L * M)
    table, _, dense, _ = both_ways("adam", [every, every[::-1], every[:, ::-1]])
    np.testing.assert_allclose(table, dense, **SMALL)


@given(batches=st.lists(any_ids, min_size=4, max_size=4))
def test_moments_of_adam_have_decayed_as_the_dense_ones_when_a_row_is_touched(batches):
    _, moments, _, state = both_ways("adam", batches)
    last = np.unique(batches[-1])
    last = last[(last >= 0) & (last < L * M)]
    for name, dense in (("mean", state[0].mu), ("square", state[0].nu)):
        a, b = (np.reshape(x, (L * M, D))[last] for x in (moments[name], dense))
        np.testing.assert_allclose(a, b, **SMALL)


@pytest.mark.parametrize("name", sorted(lazy.RULES))
def test_rows_that_nobody_reads_keep_their_bits(name):
    ids = np.full((N, K), 3, np.int32)
    table, moments, _, _ = both_ways(name, [ids])
    start = jax.random.normal(jax.random.key(0), (L, M, D))
    changed = (np.asarray(table) != start).any(-1).reshape(-1)
    assert changed.tolist() == [row == 3 for row in range(L * M)]
    for kept in moments.values():
        assert not np.delete(np.reshape(kept, (L * M, -1)), 3, axis=0).any()


def test_a_table_is_read_by_bags_only(key):
    table = arm(operands(key)[0], None).get_value()
    assert isinstance(table[...], Table)
    with pytest.raises(TypeError, match=r"use table\[\.\.\.\]"):
        table[0]
