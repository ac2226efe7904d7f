"""Numbers of four bits, as the experts of gpt-oss are published, read as bfloat16.

A tensor "e inputs outputs" is there as ``NAME_blocks``, "e outputs groups 16", two
numbers a byte, the lower four bits first, and ``NAME_scales``, "e outputs groups": the
power of two, plus 127, that each 32 numbers along the inputs share. A number is a sign,
two bits of exponent and one of mantissa, so bfloat16 has room for all of them. Only
reading is here: what is trained is written in 16 or 32 bits.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax.interop.files import CheckpointFileError

__all__ = ["Tensors", "opened", "unpacked"]

BLOCKS, SCALES = "_blocks", "_scales"
BYTES, BIAS = 16, 127
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])


class Tensors(NamedTuple):
    """Tensors as they are to be read, and a config that no longer says otherwise."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Give "e inputs outputs" in bfloat16; one expert is in memory as float32."""
    experts, outputs, groups, width = blocks.shape
    shape = experts, groups * width * 2, outputs
    whole = np.empty(shape, jnp.dtype("bfloat16"))
    for out, packed, scale in zip(whole, blocks, scales, strict=True):
        numbers = np.stack([packed & 15, packed >> 4], axis=-1)
        numbers = VALUES[numbers.reshape(outputs, groups, -1)]
        power = scale.astype(np.int32)[..., None] - BIAS
        out[...] = np.ldexp(numbers, power).reshape(outputs, -1).T
    return whole


def opened(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Tensors:
    """See a folder's tensors, packed ones as what they stand for; none is read.

    Raises:
        CheckpointFileError: for bytes that nothing says how to read, and for blocks
            whose scales are missing or of another shape.
    """
    shapes = {name: array.shape for name, array in tensors.items()}
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    about = config.get("quantization_config") or {}
    if about.get("quant_method") == "mxfp4":
        config = {k: v for k, v in config.items() if k != "quantization_config"}
        for name in [n.removesuffix(BLOCKS) for n in tensors if n.endswith(BLOCKS)]:
            pairs[name] = _pair(path, name, tensors)
            experts, outputs, groups, width = shapes.pop(name + BLOCKS)
            del shapes[name + SCALES]
            shapes[name] = experts, groups * width * 2, outputs
    odd = [n for n in shapes if n in tensors and tensors[n].dtype == np.uint8]
    if odd:
        raise CheckpointFileError(
            f"{path}: {odd[0]} has numbers of kind U8, and quantization_config does not"
            " say that they are mxfp4: take a checkpoint that is not quantized"
        )

    def read(name: str) -> np.ndarray:
        return unpacked(*pairs[name]) if name in pairs else tensors[name]

    return Tensors(dict(config), shapes, read)


def _pair(
    path: Path, name: str, tensors: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    blocks, scales = (tensors.get(name + end) for end in (BLOCKS, SCALES))
    if blocks is None or scales is None:
        raise CheckpointFileError(f"{path}: {name}{SCALES} is missing; download it")
    if blocks.ndim != 4 or blocks.shape != (*scales.shape, BYTES):
        raise CheckpointFileError(
            f"{path}: {name}{BLOCKS} {blocks.shape}, {name}{SCALES} {scales.shape}:"
            f" each {2 * BYTES} numbers need {BYTES} bytes and one scale; download it"
            " again"
        )
    return blocks, scales
