"""Masks under a mesh: the same run as on one device, cut like its parameters."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import tree
from sparsejax.masked import effective, masks_of, sparse
from sparsejax.partition import parameter_spec
from tests.masked.networks import (
    DOWN,
    EXPERTS,
    PLANS,
    TX,
    UP,
    batch,
    history,
    loss,
    network,
)

MESH = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "context": 1}


def mesh():
    kinds = (AxisType.Auto,) * len(MESH)
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=kinds)


def sharding(leaf, where):
    """Cut a variable by its letters where its rank is theirs, keep all else whole."""
    axes = getattr(leaf, "axes", "")
    fits = len(axes.split()) == getattr(leaf, "ndim", -1)
    return NamedSharding(where, parameter_spec(axes) if fits else PartitionSpec())


def place(values, where):
    cut = lambda x: jax.device_put(x, sharding(x, where))  # noqa: E731
    return jax.tree.map(cut, values, is_leaf=lambda x: hasattr(x, "axes"))


@functools.cache
def sharded(name):
    """Give parameters and state after each of four steps on eight devices."""
    config, where = PLANS[name], mesh()
    tx = sparse(TX["adamw"], config)

    @jax.jit
    def step(params, state, x):
        forward = lambda p: loss(effective(p, state, config), x)  # noqa: E731
        updates, state = tx.update(jax.grad(forward)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(where):
        params = place(network(jax.random.key(3)), where)
        state, seen = jax.jit(tx.init)(params), []
        for index in range(4):
            params, state = step(params, state, batch(index))
            seen.append((params, state))
    return seen


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["rigl", "set", "coarse_to_fine"])
def test_a_sharded_run_has_the_masks_of_one_device(name):
    alone = history("adamw", name)[1:5]
    for (one, state), (many, other) in zip(alone, sharded(name), strict=True):
        for path in (UP, DOWN, EXPERTS):
            a, b = masks_of(state)[path][...], masks_of(other)[path][...]
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        # sums over shards are in another order
        for x, y in zip(*map(jax.tree.leaves, (one, many)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_masks_are_cut_like_their_parameters():
    _, state = sharded("rigl")[-1]
    for path, mask in masks_of(state).items():
        expected = NamedSharding(mesh(), parameter_spec(mask.axes))
        assert mask[...].sharding.is_equivalent_to(expected, mask.ndim), path
        assert not expected.is_fully_replicated


def test_pruned_weights_are_zero_on_every_device():
    params, state = sharded("rigl")[-1]
    for path, mask in masks_of(state).items():
        weight = np.asarray(tree.leaves(params)[path])
        assert not weight[~np.asarray(mask[...])].any()
