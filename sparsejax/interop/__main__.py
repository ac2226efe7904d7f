r"""Bring checkpoints in and out, and look into them.

    python -m sparsejax.interop inspect --source=FOLDER
    python -m sparsejax.interop import --source=FOLDER --out=RUN [--config=FILE]
    python -m sparsejax.interop export --workdir=RUN --family=llama --out=FOLDER

A source is a folder of Hugging Face's, a GGUF file, or ``package:NAME``. A run may be
trained on, sampled from and evaluated like any other.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsejax.config import fingerprint, require, to_dict
from sparsejax.data.tokenizer_file import files_of
from sparsejax.interop.export import WRITTEN, export
from sparsejax.interop.families import FAMILIES
from sparsejax.interop.fields import describe, flat
from sparsejax.interop.load import family_of
from sparsejax.interop.pretrained import open_source
from sparsejax.interop.run import begin
from sparsejax.train.checkpoint import CheckpointError
from sparsejax.train.trained import load

__all__ = ["main"]


def _inspect(flags: argparse.Namespace) -> str:
    """Say what a checkpoint is, and what it would become."""
    source = open_source(flags.source)
    family = family_of(source.config, source.path)
    model, vocabulary = describe(family.fields, source.config, source=str(source.path))
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    lines: Iterator[tuple[str, Any]] = iter(
        [
            ("architecture", family.architecture),
            ("tensors", f"{len(source.shapes):,}"),
            ("numbers", f"{parameters:,}"),
            ("vocabulary", f"{vocabulary:,}"),
            ("tokenizer", ", ".join(source.files) or "none"),
            *((f"model.{k}", v) for k, v in flat(to_dict(model)).items()),
        ]
    )
    return "\n".join(f"{name:<32} {value}" for name, value in lines)


def _import(flags: argparse.Namespace) -> str:
    source = open_source(flags.source)
    config = begin(source, flags.out, config=flags.config)
    return f"{flags.out}: step 0 of run {fingerprint(config)}"


def _export(flags: argparse.Namespace) -> str:
    room = flags.shard_bytes
    require(room >= 1, "--shard_bytes", room, "must be at least 1")
    model, tokenizer = load(flags.workdir)
    export(
        model,
        flags.out,
        family=flags.family,
        dtype=flags.dtype,
        shard_bytes=room,
        files=files_of(tokenizer),
        ids=_special_ids(tokenizer),
    )
    return f"{flags.out}: {FAMILIES[flags.family].architecture}"


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    """Name what begins a text, and all that may end it, where there is any."""
    found = {} if tokenizer.bos is None else {"bos_token_id": tokenizer.bos}
    if ends := sorted(tokenizer.ends):
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found


COMMANDS = {"inspect": _inspect, "import": _import, "export": _export}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsejax.interop")
    commands = parser.add_subparsers(dest="command", required=True)
    look, bring, send = (commands.add_parser(name) for name in COMMANDS)
    for command in (look, bring):
        command.add_argument("--source", required=True)
    for command in (bring, send):
        command.add_argument("--out", type=Path, required=True, help="is not there yet")
    bring.add_argument("--config", type=Path, help="of the same model")
    send.add_argument("--workdir", type=Path, required=True, help="of a trained run")
    send.add_argument("--family", required=True, help=", ".join(FAMILIES))
    send.add_argument("--dtype", default="float32", choices=WRITTEN)
    send.add_argument("--shard_bytes", type=int, default=5 << 30)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 2 if it could not be done."""
    flags = _parser().parse_args(argv)
    try:
        said = COMMANDS[flags.command](flags)
    except (CheckpointError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(said + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
