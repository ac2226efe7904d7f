"""From a checkpoint to a model: no tensor is in memory twice.

``load`` reads the config, compares all names and shapes with those that the model
needs, and only then reads numbers: each device's piece of each parameter is filled from
the mapped file, in the dtype that is wanted. A checkpoint is a ``Source``: a folder
as Hugging Face's programs write it, or a GGUF file.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from sparsejax import tree
from sparsejax.config import ConfigError, convert, to_dict
from sparsejax.interop.families import FAMILIES, Family
from sparsejax.interop.fields import describe
from sparsejax.interop.layout import LAYER, Tensor, disk_shape, names_of, ours
from sparsejax.nn.config import ModelConfig, runs
from sparsejax.nn.transformer import Transformer
from sparsejax.partition import parameter_spec
from sparsejax.sharding.mesh import check_divisible
from sparsejax.typing import PyTree

__all__ = ["Need", "Source", "abstract", "family_of", "load_model", "needs"]

ALIGNMENT = 64  # bytes
COUNTED = ("experts", "layers")  # what names count, the inner first


class Source(NamedTuple):
    """A checkpoint: what its config says, and its tensors, read when they are used."""

    path: Path
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    files: Mapping[str, str]  # texts of its tokenizer


class Need(NamedTuple):
    """One of our parameters, and the tensors that it is."""

    path: str
    axes: str
    tensor: Tensor
    sizes: dict[str, int]  # by letter, as on disk
    names: dict[tuple[int, ...], str]  # by our indices of layer and expert


def family_of(config: Mapping[str, Any], source: Path) -> Family:
    """Find the family of a ``config.json``.

    Raises:
        ConfigError: if it is of none that is known here.
    """
    found = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in found:
            return family
    if not found and config.get("model_type") in FAMILIES:
        return FAMILIES[config["model_type"]]
    known = ", ".join(f"{x.architecture}" for x in FAMILIES.values())
    raise ConfigError(
        f"{source}: architectures={found!r} are not known here; known are {known}"
    )


def abstract(model: ModelConfig, vocabulary: int) -> Transformer:
    """Build a model of shapes."""
    return nnx.eval_shape(lambda: Transformer(model, vocabulary, rngs=nnx.Rngs(0)))


def needs(
    model: ModelConfig, vocabulary: int, family: Family, state: PyTree
) -> Iterator[Need]:
    """List what each variable of a model is in the family's checkpoints.

    Raises:
        ConfigError: for a variable that the family has no tensor for.
    """
    table = {tensor.path: tensor for tensor in family.tensors}
    for path, variable in tree.variables(state).items():
        inside, layers = _place(model, path)
        if inside not in table:
            raise ConfigError(
                f"{path}: {family.architecture} has no such parameter; export to a"
                " family that has, or train without it"
            )
        axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
        sizes = dict(zip(axes.split(), shape, strict=True))
        if "v" in sizes:
            sizes["v"] = vocabulary
        names = names_of(table[inside], axes, layers, sizes.get("e", 0))
        yield Need(path, axes, table[inside], sizes, dict(names))


def _place(model: ModelConfig, path: str) -> tuple[str, list[int]]:
    """Split off which layers a path is of: ``stacks/0/blocks/1/norm/scale``."""
    parts = path.split("/")
    if parts[0] != "stacks":
        return path, []
    run, block = runs(model)[int(parts[1])], int(parts[3])
    layers = [run.start + block + n * len(run.period) for n in range(run.repeats)]
    return LAYER + "/".join(parts[4:]), layers


def load_model(
    source: Source,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    compute: str | None = None,
) -> Transformer:
    """Read a checkpoint.

    Args:
        mesh: over which the parameters are cut as in training; the first device alone
            if there is none.
        dtype: of the parameters in memory.
        compute: of the activations; what the checkpoint says if None.

    Raises:
        ConfigError: if the family is not known, its config asks for what is not
            supported, tensors are missing, unexpected or misshapen (all are named), or
            the mesh cannot cut a parameter.
    """
    family = family_of(source.config, source.path)
    model, vocabulary = describe(
        family.fields, source.config, source=f"{source.path}: config"
    )
    if compute is not None:
        model = convert(ModelConfig, to_dict(model) | {"dtype": compute}, "model")
    graph, state = nnx.split(abstract(model, vocabulary))
    if mesh is not None:
        check_divisible(state, mesh)
    wanted = list(needs(model, vocabulary, family, state))
    past = _past(source.config, family, model.depth)
    _check(source, wanted, tied=model.tied, past=past)
    filled = {need.path: _filled(source, need, state, mesh, dtype) for need in wanted}
    state = tree.map_with_path(lambda path, _: filled[path], state)
    return nnx.merge(graph, state)


def _past(config: Mapping[str, Any], family: Family, depth: int) -> tuple[str, ...]:
    """Give how the names of layers begin that only predict further ahead."""
    count = max([0, *(config.get(name) or 0 for name in family.ahead)])
    return tuple(f"model.layers.{depth + n}." for n in range(count))


def _check(
    source: Source, wanted: list[Need], *, tied: bool, past: tuple[str, ...]
) -> None:
    """Compare names and shapes before any number is read."""
    shapes = {
        name: disk_shape(need.tensor.layout, need.sizes)
        for need in wanted
        for name in need.names.values()
    }
    there = dict(source.shapes)
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if tied and {head, table} <= there.keys():
        del there[head]  # written again by some programs
        if not np.array_equal(source.read(head), source.read(table)):
            raise ConfigError(
                f"{source.path}: tie_word_embeddings is true, but lm_head.weight is not"
                " model.embed_tokens.weight; set it to false in config.json"
            )
    misshapen = [
        f"{name} {there[name]} instead of {shape}"
        for name, shape in shapes.items()
        if name in there and there[name] != shape
    ]
    rest = [
        name
        for name in there
        if name not in shapes
        and not name.endswith("rotary_emb.inv_freq")
        and not name.startswith(past)
    ]
    faults = {
        "missing": [name for name in shapes if name not in there],
        "unexpected": rest,
        "misshapen": misshapen,
    }
    said = [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
    if said:
        raise ConfigError(f"{source.path}: tensors {'; '.join(said)}")


def _some(names: list[str]) -> str:
    """List all names; a run of layers or experts as one, ``layers.{0..31}``."""
    for word in COUNTED:
        names = _folded(names, re.compile(rf"(.*\b{word}\.)(\d+)(.*)"))
    return ", ".join(sorted(names))


def _folded(names: list[str], numbered: re.Pattern[str]) -> list[str]:
    found: dict[tuple[str, str], list[int]] = {}
    rest = []
    for name in names:
        if match := numbered.fullmatch(name):
            found.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            rest.append(name)
    for (before, after), numbers in found.items():
        numbers.sort()
        cuts = [n for n in range(1, len(numbers)) if numbers[n] > numbers[n - 1] + 1]
        for first, last in zip([0, *cuts], [*cuts, len(numbers)], strict=True):
            low, high = numbers[first], numbers[last - 1]
            run = str(low) if low == high else f"{{{low}..{high}}}"
            rest.append(f"{before}{run}{after}")
    return rest


def _filled(
    source: Source, need: Need, state: PyTree, mesh: Mesh | None, dtype: str
) -> jax.Array:
    """Make one parameter, each device's piece from the file."""
    shape = tree.variables(state)[need.path].get_value().shape
    if mesh is None:
        sharding: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        sharding = NamedSharding(mesh, parameter_spec(need.axes))

    @functools.cache
    def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        return block(source.read, need, bounds, jnp.dtype(dtype))

    pieces = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cut = zip(index, shape, strict=True)
        read = part(tuple(each.indices(size)[:2] for each, size in cut))
        # On a CPU it stays where it is.
        pieces.append(jax.device_put(read, device, may_alias=True))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def block(
    read: Callable[[str], np.ndarray],
    need: Need,
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Read a part of one of our parameters; rows past the vocabulary are 0."""
    piece = _zeros([last - first for first, last in bounds], dtype)
    letters = need.axes.split()
    counted = len(next(iter(need.names)))  # leading axes that names count
    for at, name in need.names.items():
        inside = zip(at, bounds[:counted], strict=True)
        if not all(first <= one < last for one, (first, last) in inside):
            continue
        whole = ours(read(name), need.tensor, need.axes, need.sizes)
        cut = tuple(
            slice(first, min(last, need.sizes[letter]))
            for (first, last), letter in zip(
                bounds[counted:], letters[counted:], strict=True
            )
        )
        part = whole[cut]
        where = tuple(one - first for one, (first, _) in zip(at, bounds, strict=False))
        piece[where + tuple(slice(0, n) for n in part.shape)] = part
    return piece


def _zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Zeros that lie where XLA can take them as they are."""
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + ALIGNMENT, np.uint8)
    first = -room.ctypes.data % ALIGNMENT
    return room[first : first + size].view(dtype).reshape(shape)
