from types import SimpleNamespace

import jax
import pytest

from sparsejax.partition import platform


def test_without_a_mesh_the_default_device_counts():
    assert platform() == "cpu"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "tpu"),
        ("TPU7x", "tpu"),
        ("NVIDIA H200", "gpu"),
        ("cpu", "cpu"),
    ],
)
def test_the_devices_of_the_mesh_count_even_if_they_are_not_there(
    kind, name, monkeypatch
):
    device = SimpleNamespace(device_kind=kind)
    mesh = SimpleNamespace(empty=False, abstract_device=device)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert platform() == name


def test_an_ambient_mesh_of_this_machine_is_of_its_platform():
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert platform() == "cpu"
