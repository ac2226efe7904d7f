import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax import partition
from sparsejax.sharding.mesh import MeshConfig, make_mesh
from sparsejax.typing import ALPHABET


def test_every_rule_is_about_a_letter_of_the_alphabet():
    assert set(partition.PARAMETERS) <= set(ALPHABET)


def test_two_letters_on_one_mesh_axis_are_an_error_that_names_both():
    with pytest.raises(
        ValueError, match="'n' and 'e' are both cut along the mesh axis"
    ):
        partition.spec("n e")


def test_vectors_are_kept_whole():
    assert partition.parameter_spec("l d") == P(None, None)


def test_expert_weights_are_cut_three_ways():
    spec = partition.parameter_spec("l e d f")
    assert spec == P(None, ("expert",), ("fsdp",), ("tensor",))


def row_sums(x, w):
    """``x @ w`` with the contracted axis cut, as each shard computes it."""
    y = x @ w
    name = partition.axis("tensor")
    return jax.lax.psum(y, name) if name else y


@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}, {"tensor": 4, "context": 2}])
def test_a_function_by_shards_equals_the_plain_call(mesh, key):
    x = jax.random.normal(key, (16, 8))
    w = jnp.cos(jnp.arange(32.0)).reshape(8, 4)

    def run(x, w):
        shards = partition.per_shard(row_sums, inputs=("n f", "f d"), outputs="n d")
        return shards(x, w)

    plain = run(x, w)
    grad = jax.grad(lambda w: jnp.sum(run(x, w) ** 2))
    expected = grad(w)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
        np.testing.assert_allclose(jax.jit(run)(x, w), plain, atol=1e-5)
        np.testing.assert_allclose(jax.jit(grad)(w), expected, rtol=1e-5, atol=1e-4)


def test_an_axis_of_size_one_does_not_exist():
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2))):
        assert partition.axis("tensor") == "tensor"
        assert partition.axis("expert") is None
    assert partition.axis("tensor") is None
