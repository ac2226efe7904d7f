"""Trees as tables: every array has one path, spelled the way configs spell it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax import tree
from sparsejax.typing import Output


class Pair(nnx.Module):
    """Parameters whose names are also words of the libraries."""

    def __init__(self, rngs):
        self.value = nnx.Param(jnp.zeros((2, 3)), axes="d f")
        self.key = nnx.Param(jnp.ones(2), axes="d")
        self.name = nnx.Variable(jnp.ones(1))
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])


PATHS = ["key", "layers/0/bias", "layers/0/kernel", "name", "value"]


@pytest.fixture
def state():
    return nnx.state(Pair(nnx.Rngs(0)))


def test_leaves_gives_every_array_its_own_path(state):
    assert list(tree.leaves(state)) == PATHS
    assert tree.leaves(state)["value"].shape == (2, 3)


def test_leaves_spells_a_plain_dict_like_the_state_it_came_from(state):
    assert list(tree.leaves(nnx.to_pure_dict(state))) == PATHS


def test_variables_gives_every_variable_its_own_path(state):
    found = tree.variables(state)
    assert list(found) == PATHS
    assert isinstance(found["value"], nnx.Param)
    assert not isinstance(found["name"], nnx.Param)


def test_variables_leaves_plain_arrays_out():
    mixed = {"a": jnp.ones(1), "b": nnx.Param(jnp.ones(1))}
    assert list(tree.variables(mixed)) == ["b"]


def test_axes_of_reads_the_letters_and_is_empty_where_there_are_none(state):
    axes = tree.axes_of(state)
    assert axes["value"] == "d f"
    assert axes["name"] == ""
    assert list(axes) == PATHS


def test_axes_survive_a_jitted_function(state):
    after = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(state)
    assert tree.axes_of(after) == tree.axes_of(state)


def test_map_with_path_hands_over_path_leaf_and_the_other_trees(state):
    def check(path, leaf, other):
        assert path in PATHS
        return leaf + other if path == "value" else leaf

    ones = jax.tree.map(jnp.ones_like, state)
    mapped = tree.leaves(tree.map_with_path(check, state, ones))
    assert (mapped["value"] == 1).all()
    assert (mapped["key"] == 1).all()


def test_paths_count_sequences_and_name_fields():
    output = Output(jnp.ones((1, 1, 1)), {"balance": jnp.ones(())}, {})
    assert list(tree.leaves([output])) == ["0", "0/losses/balance"]
    assert list(tree.leaves(output)) == ["value", "losses/balance"]


def test_a_tree_that_is_one_leaf_has_the_empty_path():
    assert list(tree.leaves(jnp.ones(1))) == [""]
    assert tree.leaves({}) == {}
