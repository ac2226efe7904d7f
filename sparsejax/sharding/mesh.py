"""Meshes from a config, and shardings from parameters' letters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparsejax.config import ConfigError, require
from sparsejax.partition import MESH_AXES, parameter_spec
from sparsejax.tree import variables
from sparsejax.typing import PyTree


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, for all that are left.

    ``data``, ``fsdp`` and ``expert`` share the batch; ``fsdp`` also cuts parameters,
    ``expert`` experts, ``tensor`` heads and hidden widths, ``context`` the sequence.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in MESH_AXES:
            size = getattr(self, name)
            require(size > 0 or size == -1, name, size, "must be positive, or -1")
        free = [name for name in MESH_AXES if getattr(self, name) == -1]
        require(len(free) < 2, free[-1] if free else "", -1, "only one axis may be -1")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Give every axis its size.

        Raises:
            ConfigError: if the axes do not multiply to the number of devices.
        """
        sizes = [getattr(self, name) for name in MESH_AXES]
        fixed = math.prod(size for size in sizes if size > 0)
        text = " x ".join(f"{n}={getattr(self, n)}" for n in MESH_AXES)
        exact = fixed == devices if -1 not in sizes else devices % fixed == 0
        if not exact:
            raise ConfigError(
                f"config.mesh: {text} does not match {devices} devices; make the"
                " product equal to the devices, or set one axis to -1"
            )
        return tuple(devices // fixed if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices, all of them by default, as the config says."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    # An axis may need parts of a torus's: 16 experts' of a pod of 8 x 8 x 8 chips.
    arranged = mesh_utils.create_device_mesh(
        sizes, devices, allow_split_physical_axes=True
    )
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(arranged, MESH_AXES, axis_types=kinds)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shard every ``nnx.Variable`` by its letters, and keep all else whole.

    Moments, masks and accumulators keep their parameter's ``axes`` metadata, so they
    are cut like it; a leaf whose rank differs from its letters (a factored moment) is
    kept whole.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata().get("axes", "")
        value = leaf.get_value()
        if not hasattr(value, "shape"):  # a placeholder of optax's, with no array in it
            return leaf
        fits = len(axes.split()) == len(value.shape)
        spec = parameter_spec(axes) if fits else PartitionSpec()
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def check_divisible(params: PyTree, mesh: Mesh) -> None:
    """Refuse a mesh that cannot cut some parameter evenly.

    Raises:
        ConfigError: naming the mesh axis, the parameter, its axis and its size.
    """
    for path, variable in variables(params).items():
        axes = variable.axes.split()
        for letter, size, names in zip(
            axes, variable.get_value().shape, parameter_spec(variable.axes), strict=True
        ):
            for name in (names,) if isinstance(names, str) else names or ():
                if size % mesh.shape[name]:
                    raise ConfigError(
                        f"config.mesh.{name}={mesh.shape[name]}: must divide axis"
                        f" {letter!r} of {path}, which has size {size}"
                    )
