"""A folder as Hugging Face's programs write it: config, tensors in one or more files.

``open_folder`` maps all of it and reads no number. Weights that are Python programs
(pickles) are not opened.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.data.tokenizer_file import ABOUT, JSON, TEMPLATE
from sparsejax.interop.fields import check_kinds
from sparsejax.interop.files import CheckpointFileError, read
from sparsejax.interop.load import Source
from sparsejax.interop.mxfp4 import opened

__all__ = ["INDEX", "SINGLE", "TOKENIZER_FILES", "open_folder", "read_json"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (JSON, ABOUT, TEMPLATE)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def open_folder(path: Path) -> Source:
    """Open a checkpoint.

    Raises:
        CheckpointFileError: if the folder holds none, or a file of it is not whole.
        ConfigError: if a field of its config is of another kind than it must be.
    """
    if not path.is_dir():
        raise CheckpointFileError(f"{path}: no such folder")
    config = read_json(path / "config.json")
    check_kinds(config, source=str(path / "config.json"))
    if (path / INDEX).is_file():
        return _source(path, config, _sharded(path))
    if (path / SINGLE).is_file():
        return _source(path, config, read(path / SINGLE))
    if any(found := [p.name for kind in PICKLES for p in path.glob(kind)]):
        raise CheckpointFileError(
            f"{path}: {', '.join(sorted(found))}: pickled weights run whatever program"
            " they hold when they are opened, so they are refused; take or make a"
            " checkpoint in safetensors"
        )
    raise CheckpointFileError(f"{path}: neither {SINGLE} nor {INDEX} is here")


def _source(path: Path, config: dict, tensors: Mapping[str, np.ndarray]) -> Source:
    files = {
        name: (path / name).read_text(encoding="utf-8")
        for name in TOKENIZER_FILES
        if (path / name).is_file()
    }
    return Source(path, *opened(path, config, tensors), files)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointFileError: if there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointFileError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointFileError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointFileError(f"{path}: is no JSON object")
    return found


def _sharded(path: Path) -> Mapping[str, np.ndarray]:
    """Map every file that the index names, and believe it only where it is right."""
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(x, str) for x in index.values()
    ):
        raise CheckpointFileError(f"{path / INDEX}: has no weight_map of file names")
    files = sorted(set(index.values()))
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointFileError(
                f"{path / INDEX}: {name!r} is not the name of a file in this folder"
            )
    absent = [name for name in files if not (path / name).is_file()]
    if absent:
        raise CheckpointFileError(
            f"{path}: {', '.join(absent)} of {len(files)} files are missing; download"
            " them"
        )
    shards = {name: read(path / name) for name in files}
    wrong = [name for name, file in index.items() if name not in shards[file]]
    if wrong:
        raise CheckpointFileError(
            f"{path / INDEX}: {', '.join(sorted(wrong))} are not in the files it names"
        )
    # A tensor that no index names is there all the same, and will be called unexpected.
    return {name: array for shard in shards.values() for name, array in shard.items()}
