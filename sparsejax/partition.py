"""Sharding is the axis alphabet again: letters name axes, rules map letters to a mesh.

A mesh has up to five axes. ``data``, ``fsdp`` and ``expert`` share the batch; ``fsdp``
also shards the width of every weight, ``expert`` the experts, ``tensor`` heads, hidden
widths and vocabulary, ``context`` the sequence. Models are written for global arrays;
``constrain`` pins a layout and ``per_shard`` runs a function on each device's piece,
both under whatever mesh is ambient (``jax.set_mesh``) and as plain calls without one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from sparsejax.typing import Array

__all__ = [
    "ACTIVATIONS",
    "BATCH",
    "MESH_AXES",
    "PARAMETERS",
    "alike",
    "axis",
    "constrain",
    "parameter_spec",
    "per_shard",
    "platform",
    "replicated",
    "spec",
]

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH = ("data", "fsdp", "expert")

# The platform of a device is told by the first word of its kind.
MAKERS = {"TPU": "tpu", "NVIDIA": "gpu"}

Rules = Mapping[str, tuple[str, ...]]

ACTIVATIONS: Rules = {
    "b": BATCH,
    "n": (*BATCH, "context"),
    "t": ("context",),
    "i": ("context",),
    "h": ("tensor",),
    "g": ("tensor",),
    "f": ("tensor",),
    "v": ("tensor",),
    "e": ("expert",),
}
PARAMETERS: Rules = {
    **ACTIVATIONS,
    "d": ("fsdp",),
    "z": ("fsdp",),
    "m": ("tensor",),
}


def spec(axes: str, rules: Rules = ACTIVATIONS) -> PartitionSpec:
    """Translate axis letters, ``"b t d"``, to a partition of the mesh.

    Anything that is not a letter with a rule (``2``, ``d`` of an activation) stays
    whole.

    Raises:
        ValueError: if two letters would be cut along one mesh axis.
    """
    owner: dict[str, str] = {}
    entries = []
    for letter in axes.split():
        names = rules.get(letter, ())
        for name in names:
            if name in owner:
                raise ValueError(
                    f"axes {axes!r}: {owner[name]!r} and {letter!r} are both cut"
                    f" along the mesh axis {name!r}; give one of them another letter"
                )
            owner[name] = letter
        entries.append(names or None)
    return PartitionSpec(*entries)


def parameter_spec(axes: str) -> PartitionSpec:
    """Partition a parameter; vectors, a norm's scale say, are kept whole everywhere."""
    letters = axes.split()
    if len([x for x in letters if x != "l"]) < 2:
        return PartitionSpec(*[None] * len(letters))
    return spec(axes, PARAMETERS)


def _ambient() -> Any:
    """The mesh that ``jax.set_mesh`` made ambient, if there is work to cut."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.axis_sizes) == 1:
        return None
    return mesh


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the ambient mesh's devices, else the default.

    The ambient mesh may be of devices that are not there, for compiling ahead of time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return jax.default_backend()
    kind = str(device.device_kind)
    maker = kind.partition(" ")[0].rstrip("0123456789x")
    return MAKERS.get(maker, kind)


def _is_manual(mesh: Any) -> bool:
    return any(kind == AxisType.Manual for kind in mesh.axis_types)


def axis(name: str) -> str | None:
    """Give ``name`` if the ambient mesh really cuts along it, else None."""
    mesh = _ambient()
    if mesh is None or mesh.shape.get(name, 1) == 1:
        return None
    return name


def _restricted(partition: PartitionSpec, mesh: Any) -> PartitionSpec:
    """Drop the axes that the mesh lacks or does not cut along."""

    def keep(entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,)
        kept = tuple(n for n in names if n and mesh.shape.get(n, 1) > 1)
        return kept or None

    return PartitionSpec(*map(keep, partition))


def constrain(x: Array, axes: str, rules: Rules = ACTIVATIONS) -> Array:
    """Pin the layout of an array to what its axes ask for under the ambient mesh."""
    mesh = _ambient()
    if mesh is None or _is_manual(mesh):
        return x
    partition = _restricted(spec(axes, rules), mesh)
    return jax.lax.with_sharding_constraint(x, partition)


def per_shard(
    function: Callable[..., Any], *, inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """Run ``function`` on each device's piece, under one ``shard_map`` over all axes.

    Args:
        function: takes and returns local pieces; may use collectives over the mesh axes
            that ``axis`` says are there.
        inputs: axes strings, one for each argument (a prefix of the arguments' trees).
        outputs: axes strings for what is returned, likewise.
    """
    mesh = _ambient()
    if mesh is None or _is_manual(mesh):
        return function

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda axes: _restricted(spec(axes), mesh), tree)

    return jax.shard_map(
        function, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=True
    )


def alike(start: Any, *trees: Any) -> Any:
    """Mark arrays as varying over every mesh axis that one of them varies over.

    Args:
        start: tree of arrays to mark.
        trees: others that they must be like, such as a loop's inputs.
    """

    def varying(x: Any) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    arrays = (x for x in jax.tree.leaves((start, trees)) if hasattr(x, "dtype"))
    names = frozenset().union(*map(varying, arrays))

    def mark(x: Any) -> Any:
        return jax.lax.pcast(x, tuple(names - varying(x)), to="varying")

    return jax.tree.map(mark, start)


def replicated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function whose results are whole on every device of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    options: dict[str, Any] = {} if mesh.empty else {"out_shardings": PartitionSpec()}
    return jax.jit(function, **options)
