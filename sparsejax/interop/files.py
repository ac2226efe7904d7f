"""Files of tensors in the safetensors format: memory-mapped, and written as a stream.

A file is the length of a header, the header (JSON: dtype, shape and place of each
tensor) and the bytes of all tensors, one after the other. Reading gives views of the
mapped file, so nothing is in memory before it is used; bfloat16 needs no framework.
Whatever is wrong with a file raises ``CheckpointFileError`` with its path.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["CheckpointFileError", "Shape", "plan", "read", "write"]

LONGEST_HEADER = 100 << 20

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
    "U8": np.dtype("uint8"),  # packed numbers, for what knows how
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointFileError(ValueError):
    """A file of a checkpoint that cannot be used; the message is for the user."""


class Shape(NamedTuple):
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def read(path: Path) -> dict[str, np.ndarray]:
    """Map a file; its tensors by name, read-only.

    Raises:
        CheckpointFileError: if the file is not whole, or not such a file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, LONGEST_HEADER):
            raise CheckpointFileError(
                f"{path}: not a safetensors file, or cut short: it has {size} bytes;"
                " download it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        return _mapped(path, entries, start=8 + length, size=size)
    except (AttributeError, LookupError, TypeError, UnicodeError, json.JSONDecodeError):
        raise CheckpointFileError(
            f"{path}: its header is not that of safetensors"
        ) from None


def _mapped(
    path: Path, entries: Mapping[str, dict], *, start: int, size: int
) -> dict[str, np.ndarray]:
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    if size != start + max(ends, default=0):
        raise CheckpointFileError(
            f"{path}: has {size} bytes where its header says"
            f" {start + max(ends, default=0)}: cut short or overwritten; download it"
            " again"
        )
    data = np.memmap(path, np.uint8, "r", offset=start) if size > start else np.empty(0)
    return {name: _view(path, name, data, entry) for name, entry in entries.items()}


def _view(path: Path, name: str, data: np.ndarray, entry: dict) -> np.ndarray:
    kind, (first, last) = entry["dtype"], entry["data_offsets"]
    if kind not in DTYPES:
        raise CheckpointFileError(
            f"{path}: {name} has numbers of kind {kind}; readable are"
            f" {', '.join(DTYPES)}: take a checkpoint that is not quantized"
        )
    about = Shape(tuple(entry["shape"]), DTYPES[kind])
    if not 0 <= first <= last or last - first != about.nbytes:
        raise CheckpointFileError(
            f"{path}: {name} of shape {about.shape} in {kind} has {last - first} bytes,"
            f" not {about.nbytes}"
        )
    return data[first:last].view(about.dtype).reshape(about.shape)


def plan(tensors: Mapping[str, Shape], *, shard_bytes: int) -> list[list[str]]:
    """Divide tensors into files, in order, each as large as allowed."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, about in tensors.items():
        if about.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= about.nbytes
    return shards


def write(
    path: Path, tensors: Mapping[str, Shape], values: Callable[[str], np.ndarray]
) -> None:
    """Write a file; one tensor is in memory at a time.

    Args:
        tensors: what is written, in this order.
        values: gives a tensor by its name.
    """
    place, header = 0, {}
    for name, about in tensors.items():
        header[name] = {
            "dtype": NAMES[about.dtype],
            "shape": list(about.shape),
            "data_offsets": [place, place + about.nbytes],
        }
        place += about.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that numbers lie at multiples of their size
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in _blocks(tensors, values):
            file.write(block)


def _blocks(
    tensors: Mapping[str, Shape], values: Callable[[str], np.ndarray]
) -> Iterator[bytes]:
    for name, about in tensors.items():
        array = np.ascontiguousarray(values(name))
        if array.shape != about.shape or array.dtype != about.dtype:
            raise ValueError(f"{name}: {array.dtype}{array.shape} is not {about}")
        yield array.reshape(-1).view(np.uint8).tobytes()
