r"""Sample from a model, a trained run's or a checkpoint of another program's.

    python -m sparsejax.sample --workdir=RUN
    python -m sparsejax.sample --checkpoint=FOLDER --prompt="Once" --prompt="There was"

Text appears as it is drawn; that of several prompts, drawn together, when all is done.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sparsejax.config import ConfigError, require
from sparsejax.interop import load_pretrained
from sparsejax.interop.chat import asked
from sparsejax.nn.generate import stream
from sparsejax.nn.transformer import Transformer
from sparsejax.train.checkpoint import CheckpointError
from sparsejax.train.trained import alone, load
from sparsejax.typing import PRNGKeyArray

__all__ = ["continued", "load", "load_any", "main"]


def load_any(
    workdir: Path | None,
    checkpoint: str | None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Transformer, Any]:
    """Load a run's newest checkpoint, or another program's: model and tokenizer.

    Args:
        workdir: of a trained run.
        checkpoint: a folder, a GGUF file, ``package:NAME``.
        mesh: over which the parameters are cut; the first device alone if None.

    Raises:
        ConfigError: unless exactly one is given, and is what it should be.
    """
    if (workdir is None) == (checkpoint is None):
        raise ConfigError("give one of --workdir=RUN and --checkpoint=FOLDER")
    if workdir is not None:
        return load(workdir, mesh=mesh)
    return load_pretrained(checkpoint or "", mesh=mesh)


def continued(
    model: Transformer,
    tokenizer: Any,
    prompts: list[str],
    *,
    show: Callable[[str], Any] = str,
    encode: Callable[[str], Any] | None = None,
    **options: Any,
) -> list[str]:
    """Return what follows each prompt.

    Args:
        show: called with each new piece of the first prompt's text, whole characters.
        encode: gives the ids of a prompt; the tokenizer's ``prompt`` if None.
        options: those of ``stream``.
    """
    ids = [(encode or tokenizer.prompt)(prompt) for prompt in prompts]
    drawn: list[list[int]] = [[] for _ in prompts]
    shown = ""
    for tokens in stream(model, ids, ends=tokenizer.ends, **options):
        for row, token in zip(drawn, tokens.tolist(), strict=True):
            if token >= 0 and token not in tokenizer.ends:
                row.append(token)
        text = tokenizer.decode(drawn[0])
        # A character that is not whole yet ends in the mark for what is no text.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            show(text.removeprefix(shown))
            shown = text
    texts = [tokenizer.decode(row) for row in drawn]
    show(texts[0].removeprefix(shown))
    return texts


def _written(text: str) -> str:
    r"""Read ``\n`` and the like, which a shell passes on as two characters."""
    if not text.isascii() and any("\ud800" <= x <= "\udfff" for x in text):
        raise ConfigError(f"--prompt={text!r}: holds bytes that are not UTF-8")
    meant = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: meant[found[1]], text)


def _key(seed: int) -> PRNGKeyArray:
    """Give the key of a seed; one of more bits would be cut."""
    require(0 <= seed < 2**31, "--seed", seed, "must be in [0, 2**31)")
    return jax.random.key(seed)


def _tools(path: Path | None) -> list[dict[str, Any]] | None:
    """Read the tools that an answer may call."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise ConfigError(
            f"--tools={path}: must be a JSON list of tools, each an object: its schema"
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsejax.sample")
    parser.add_argument("--workdir", type=Path, help="of a trained run")
    parser.add_argument("--checkpoint", help="a folder, a GGUF file, package:NAME")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--chat", action="store_true", help="as a user's message")
    parser.add_argument("--tools", type=Path, help="of a chat: a JSON list of schemas")
    parser.add_argument("--tokens", type=int, default=200, help="how many to draw")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus, in (0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, load, sample, and write the text to standard output."""
    flags = vars(_parser().parse_args(argv))
    given = flags.pop("prompt") or ["The "]

    def show(text: str) -> None:
        if len(given) == 1:
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        prompts = heads = [_written(text) for text in given]
        key, tools = _key(flags.pop("seed")), _tools(flags.pop("tools"))
        rule = "are read by the chat template; add --chat"
        require(tools is None or flags["chat"], "--tools", tools, rule)
        model, tokenizer = load_any(flags.pop("workdir"), flags.pop("checkpoint"))
        if flags.pop("chat"):
            # The template spells what opens a text.
            flags["encode"] = lambda text: tokenizer.encode(
                asked(tokenizer, text, tools=tools)
            )
            heads = [f"{prompt}\n" for prompt in prompts]
        show(heads[0])
        with jax.set_mesh(alone()):
            texts = continued(model, tokenizer, prompts, show=show, key=key, **flags)
    except (CheckpointError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if len(prompts) > 1:
        both = zip(heads, texts, strict=True)
        sys.stdout.write("\n---\n".join(head + text for head, text in both))
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
