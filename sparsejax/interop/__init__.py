"""Checkpoints of other programs, in and out, exactly.

``open_source`` opens a folder of Hugging Face's or a GGUF file, ``load_model`` makes
our Transformer of it, ``export`` writes a folder. What a family of models looks like
is a table in ``FAMILIES``.
"""

from sparsejax.interop.export import export
from sparsejax.interop.families import FAMILIES, Family
from sparsejax.interop.files import CheckpointFileError
from sparsejax.interop.load import Source, load_model
from sparsejax.interop.pretrained import load_pretrained, open_source

__all__ = [
    "FAMILIES",
    "CheckpointFileError",
    "Family",
    "Source",
    "export",
    "load_model",
    "load_pretrained",
    "open_source",
]
