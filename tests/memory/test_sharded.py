"""The sums over rows under a mesh of eight devices, against the plain ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.memory import sharded, tiles
from sparsejax.memory.bag import embedding_bag, row_products
from sparsejax.memory.lookup import product_key_top_k
from sparsejax.partition import MESH_AXES

M, D, N, K = 16, 12, 24, 3
MESHES = [(2, 2, 1, 2, 1), (1, 4, 1, 1, 2), (1, 1, 2, 4, 1), (8, 1, 1, 1, 1)]
FUNCTIONS = [(embedding_bag, K), (row_products, D)]


def operands(key, width, tokens=N):
    keys = jax.random.split(key, 3)
    table = jax.random.normal(keys[0], (M, D))
    ids = jax.random.randint(keys[1], (tokens, K), 0, M)
    return table, ids, jax.random.normal(keys[2], (tokens, width))


def mesh_of(sizes):
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, kinds)


def step_of(function):
    def loss(table, ids, other):
        y = function(table, ids, other)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, (0, 2), has_aux=True, allow_int=True))


@pytest.mark.few(3)
@pytest.mark.parametrize(("function", "width"), FUNCTIONS)
@pytest.mark.parametrize("sizes", MESHES)
def test_sums_under_any_mesh_are_the_plain_sums(
    function, width, sizes, key, monkeypatch
):
    monkeypatch.setattr(tiles, "TILE", 4 * K * D)
    arrays = operands(key, width)
    expected = step_of(function)(*arrays)
    with jax.set_mesh(mesh_of(sizes)):
        found = step_of(function)(*arrays)
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(same, found, expected)


@pytest.mark.parametrize(("function", "width"), FUNCTIONS)
def test_tokens_that_do_not_divide_are_summed_all_the_same(function, width, key):
    arrays = operands(key, width, tokens=7)
    expected = step_of(function)(*arrays)
    with jax.set_mesh(mesh_of(MESHES[0])):
        found = step_of(function)(*arrays)
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(same, found, expected)


@pytest.mark.parametrize("bad", [M, -1])
def test_ids_that_no_device_owns_read_nan_under_a_mesh(bad, key):
    table, ids, weights = operands(key, K)
    with jax.set_mesh(mesh_of(MESHES[0])):
        y = jax.jit(embedding_bag)(table, ids.at[5, 1].set(bad), weights)
    np.testing.assert_array_equal(np.isnan(y).any(-1), np.arange(N) == 5)


def test_no_device_gathers_the_table_or_reduces_it_once_a_tile(key, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4 * K * D)
    table, ids, weights = operands(key, K)
    mesh = mesh_of(MESHES[0])
    with jax.set_mesh(mesh):
        table = jax.device_put(table, NamedSharding(mesh, P("tensor", "fsdp")))
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        ids, weights = jax.device_put((ids, weights), rows)
        step = step_of(embedding_bag).lower(table, ids, weights).compile()
    reduced = f"f32[{M // 2},{D // 2}]"
    text = step.as_text()
    assert f"[{M},{D}]" not in text
    assert (
        len([x for x in text.splitlines() if f"= {reduced}" in x and "all-red" in x])
        == 1
    )


def test_sums_inside_a_shard_map_are_local(key):
    table, ids, weights = operands(key, K)
    with jax.set_mesh(mesh_of(MESHES[3])):
        run = jax.shard_map(
            sharded.sum_rows, in_specs=(P(), P("data"), P("data")), out_specs=P("data")
        )
        y = jax.jit(run)(table, ids, weights)
    np.testing.assert_allclose(y, tiles.sum_rows(table, ids, weights), rtol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", [(24, 2), (7, 2), (24, 3)])
def test_lookup_under_a_mesh_is_the_lookup(shape, key):
    queries = jax.random.normal(key, (*shape, 4))
    keys = jax.random.normal(jax.random.fold_in(key, 1), (shape[1], 2, 5, 2))
    find = jax.jit(partial(product_key_top_k, k=6))
    expected = find(queries, keys)
    with jax.set_mesh(mesh_of(MESHES[0])):
        found = find(queries, keys)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)


def test_tokens_are_searched_where_they_are(key):
    mesh = mesh_of(MESHES[0])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
        queries = jax.device_put(jax.random.normal(key, (N, 2, 4)), rows)
        keys = jax.device_put(jnp.ones((2, 2, 5, 2)), NamedSharding(mesh, P("tensor")))
        find = jax.jit(partial(product_key_top_k, k=6))
        assert "all-gather" not in find.lower(queries, keys).compile().as_text()
