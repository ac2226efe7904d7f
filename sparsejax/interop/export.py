"""From a model to a checkpoint that Hugging Face's programs read.

The folder appears whole or not at all. What the family cannot say about the model, and
parameters it has no name for, are refused before a file is written.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax import tree
from sparsejax.config import ConfigError, near
from sparsejax.interop.families import FAMILIES, Family
from sparsejax.interop.fields import document
from sparsejax.interop.files import Shape, plan, write
from sparsejax.interop.folder import INDEX, SINGLE
from sparsejax.interop.layout import disk_shape, ours
from sparsejax.interop.load import Need, needs
from sparsejax.nn.transformer import Transformer

__all__ = ["WRITTEN", "appears", "export"]

SHARD_BYTES = 5 << 30
WRITTEN = ("float32", "bfloat16", "float16")


@contextlib.contextmanager
def appears(out: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes ``out`` if nothing goes wrong.

    Raises:
        ConfigError: if ``out`` is there already.
    """
    if out.exists():
        raise ConfigError(f"--out={out}: is there already; name another, or remove it")
    draft = out.absolute().with_name(f".{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def export(
    model: Transformer,
    out: Path,
    *,
    family: str,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    files: Mapping[str, str] | None = None,
    ids: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint.

    Args:
        model: of parameters that this process holds.
        out: a folder that is not there yet.
        family: a name of ``FAMILIES``.
        dtype: of the tensors, one of ``WRITTEN``; ``float32`` keeps every bit.
        shard_bytes: size above which tensors are divided over files.
        files: of the tokenizer, by name.
        ids: of special tokens, for ``config.json``.

    Raises:
        ConfigError: if there is no such family or dtype, it cannot say what the model
            is, or ``out`` is there.
    """
    if dtype not in WRITTEN:
        raise ConfigError(
            f"--dtype={dtype}: written are {', '.join(WRITTEN)}; numbers of fewer bits"
            " are only read"
        )
    if family not in FAMILIES:
        raise ConfigError(f"--family={family}: no such name{near(family, FAMILIES)}")
    about = FAMILIES[family]
    config = document(about.fields, model.config, model.vocabulary)
    shapes, values = _tensors(model, about, jnp.dtype(dtype))
    config |= {"architectures": [about.architecture], "model_type": family}
    config |= {"torch_dtype": dtype, **(ids or {})}
    with appears(out) as draft:
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, text in (files or {}).items():
            (draft / name).write_text(text, encoding="utf-8")
        _write(draft, shapes, plan(shapes, shard_bytes=shard_bytes), values)


def _tensors(
    model: Transformer, family: Family, dtype: np.dtype
) -> tuple[dict[str, Shape], Callable[[str], np.ndarray]]:
    """Say what is to be written, and how to make each of it."""
    _, state = nnx.split(model)
    arrays = tree.leaves(state)
    parts: dict[str, list[tuple[Need, tuple[int, ...]]]] = {}
    for need in needs(model.config, model.vocabulary, family, state):
        for at, name in need.names.items():
            parts.setdefault(name, []).append((need, at))
    firsts = {name: found[0][0] for name, found in sorted(parts.items())}
    shapes = {
        name: Shape(disk_shape(need.tensor.layout, need.sizes), dtype)
        for name, need in firsts.items()
    }

    def values(name: str) -> np.ndarray:
        disk = np.zeros(*shapes[name])
        for need, at in parts[name]:
            _put(disk, need, arrays[need.path][at])
        return disk

    return shapes, values


def _put(disk: np.ndarray, need: Need, value: jax.Array) -> None:
    """Write one of our arrays into the tensor that it is, or is a part of."""
    target = ours(disk, need.tensor, need.axes, need.sizes)
    real = np.asarray(value)[tuple(slice(0, n) for n in target.shape)]
    target[...] = real


def _write(
    folder: Path, shapes: Mapping[str, Shape], shards: list[list[str]], values: Any
) -> None:
    """Write one file, or several and their index."""
    if len(shards) == 1:
        return write(folder / SINGLE, shapes, values)
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / file, {name: shapes[name] for name in names}, values)
        index |= dict.fromkeys(names, file)
    total = sum(about.nbytes for about in shapes.values())
    text = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(text, indent=2) + "\n")
    return None
