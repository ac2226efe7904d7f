import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsejax.config import ConfigError, FieldError
from sparsejax.sharding.mesh import MeshConfig, check_divisible, make_mesh, shardings


def test_minus_one_takes_the_devices_that_are_left():
    assert MeshConfig(tensor=2).sizes(8) == (4, 1, 1, 2, 1)


def test_a_mesh_that_does_not_match_the_devices_says_so():
    with pytest.raises(ConfigError, match=r"tensor=3 x context=1 does not match 8"):
        MeshConfig(tensor=3).sizes(8)


def test_a_fixed_mesh_must_use_every_device():
    with pytest.raises(ConfigError, match="does not match 8 devices"):
        MeshConfig(data=2).sizes(8)


def test_two_free_axes_are_refused():
    with pytest.raises(FieldError, match="only one axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_an_axis_of_no_devices_is_refused():
    with pytest.raises(FieldError, match="tensor=0: must be positive"):
        MeshConfig(tensor=0)


def test_a_tree_is_cut_by_its_letters_and_the_rest_is_whole():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    weight = nnx.Param(jnp.zeros((4, 6)), axes="d f")
    factored = nnx.Param(jnp.zeros(4), axes="d f")
    cut = shardings({"w": weight, "row": factored, "step": jnp.zeros(())}, mesh)
    assert cut["w"].get_value().spec == P(("fsdp",), ("tensor",))
    assert cut["row"].get_value().spec == P()
    assert cut["step"].spec == P()


def test_the_parameter_that_cannot_be_cut_is_named():
    mesh = make_mesh(MeshConfig(tensor=4))
    with pytest.raises(
        ConfigError, match=r"mesh.tensor=4: must divide axis 'f' of w/up"
    ):
        check_divisible({"w": {"up": nnx.Param(jnp.zeros((4, 6)), axes="d f")}}, mesh)


def test_a_mesh_may_use_some_of_the_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:2]).shape["data"] == 2
