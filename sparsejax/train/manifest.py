"""The JSON document beside a checkpoint's arrays: what they are, and a seal.

A manifest is ``{"sha256": seal, "body": body}``. The body holds ``step``, ``loss``,
``config``, ``data``, and by path of every array its ``arrays`` (dtype and shape) and
``checksums``. The seal is a hash of what the body means, so spaces do not matter and
anything else does.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sparsejax.config import ConfigError

__all__ = ["ManifestError", "check_same", "describe", "open_sealed", "sealed"]

_SHOWN = 8  # differences that one message lists


class ManifestError(ValueError):
    """A manifest that is not what was written."""


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Make the document of a body, as JSON will give it back.

    Raises:
        TypeError: for what JSON cannot hold.
        ValueError: for a number that is not finite.
    """
    # Keys and tuples change on their way through JSON: seal what will be read.
    plain = json.loads(json.dumps(body, allow_nan=False))
    return {"sha256": _seal(plain), "body": plain}


def open_sealed(text: str) -> dict[str, Any]:
    """Give the body of a document.

    Raises:
        ManifestError: if it is no such document, or its seal is broken.
    """
    try:
        document = json.loads(text)
        body, seal = document["body"], document["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ManifestError("the manifest cannot be read") from None
    if seal != _seal(body):
        raise ManifestError("the manifest was changed")
    return body


def describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Give dtype and shape of arrays by path: ``float32[8,64]``."""
    return {
        path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in arrays.items()
    }


def check_same(where: Any, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another model, in one line.

    Raises:
        ConfigError: naming the first paths that are not described alike in both.
    """
    faults = [
        f"{path} is {saved.get(path, 'absent')}, not {wanted.get(path, 'absent')}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if not faults:
        return
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    raise ConfigError(
        f"checkpoint {where} is of another model: {'; '.join(faults[:_SHOWN] + more)};"
        " use the config it was saved with, or another workdir"
    )


def _seal(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
