r"""How well a model knows a text, and whether it finds what stands far back.

    python -m sparsejax.evaluate --workdir=RUN
    python -m sparsejax.evaluate --checkpoint=FOLDER --data.name=english --documents=50
    python -m sparsejax.evaluate --checkpoint=FOLDER --tasks needle multi_key \
        --lengths 256 1024

Every token of a held-out document is scored once, after as many tokens before it as a
window has; windows move by a stride. A run's own documents are scored, held out as it
held them out, unless others are named. Bits per byte divides by the bytes of the text,
so that tokenizers compare. A task is solved if each token of the answer is the
likeliest.

Rows are cut over the devices, parameters too with ``--mesh.fsdp`` and the like. With
``--json`` what is found is written as it is found: the same command started again goes
on where it stood.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.config import ConfigError, choose, convert, near, require
from sparsejax.data import DataConfig
from sparsejax.data.sources import Documents, open_documents
from sparsejax.data.tasks import TASKS, at_length
from sparsejax.interop import open_source
from sparsejax.kept import Kept, listing
from sparsejax.nn.transformer import Transformer
from sparsejax.partition import BATCH, MESH_AXES, constrain
from sparsejax.sample import load_any
from sparsejax.sharding import MeshConfig, make_mesh
from sparsejax.train.checkpoint import CheckpointError
from sparsejax.train.trained import config_of
from sparsejax.train.workdir import check_place
from sparsejax.typing import Array, Float, Int

__all__ = ["Window", "main", "score_tasks", "score_text", "windows"]

EVERY = 8  # batches of text between two writings
AXES = [x for x in MESH_AXES if x != "context"]  # odd lengths have none to cut


class Window(NamedTuple):
    """A stretch of tokens, and which of them count."""

    start: int
    stop: int
    first: int  # the first that is scored; all before it only inform


def windows(tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """Cover a document: each token but the first is scored once.

    Raises:
        ValueError: unless ``0 < stride < window``.
    """
    if not 0 < stride < window:
        raise ValueError(f"stride={stride}: must be positive and below window={window}")
    start, first = 0, 1
    while first < tokens:
        stop = min(start + window, tokens)
        yield Window(start, stop, first)
        start, first = start + stride, stop


class Row(NamedTuple):
    """A sequence to score, and the weight of each of its tokens, the first 0."""

    tokens: Int[np.ndarray, " t"]
    weights: Float[np.ndarray, " t"]


def _rows(ids: Int[np.ndarray, " n"], *, window: int, stride: int) -> Iterator[Row]:
    for part in windows(len(ids), window=window, stride=stride):
        at = np.arange(part.start, part.stop)
        weights = (at >= part.first).astype(np.float32)
        yield Row(ids[part.start : part.stop], weights)


class Scores(NamedTuple):
    """Of each row: nats of what counts, and whether all of it was likeliest."""

    nats: Float[Array, " b"]
    greedy: Array


@jax.jit
def scored(
    model: Transformer,
    tokens: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    segments: Int[Array, "b t"],
) -> Scores:
    """Score the tokens that have a weight, from those before them.

    Rows end in padding, of segment 0: no token sees it, and it visits no expert.
    """
    tokens, weights, segments = (
        constrain(x, "b t") for x in (tokens, weights, segments)
    )
    logits = model.logits(model(tokens[:, :-1], segments=segments[:, :-1]).value)
    hit = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    counts = weights[:, 1:]
    nats = (jax.nn.logsumexp(logits, axis=-1) - hit) * counts
    best = (hit >= logits.max(axis=-1)) | (counts == 0)
    return Scores(nats.sum(axis=1), best.all(axis=1))


def _score(
    model: Transformer, rows: Iterable[Row], *, length: int, batch: int, pad: int
) -> Iterator[tuple[Row, float, bool]]:
    """Score rows in batches of one shape."""
    rows = iter(rows)
    while some := list(islice(rows, batch)):
        tokens = np.full((batch, length), pad, np.int32)
        weights = np.zeros((batch, length), np.float32)
        segments = np.zeros((batch, length), np.int32)
        for index, row in enumerate(some):
            tokens[index, : len(row.tokens)] = row.tokens
            weights[index, : len(row.tokens)] = row.weights
            segments[index, : len(row.tokens)] = 1
        given = map(jnp.asarray, (tokens, weights, segments))
        found = jax.device_get(scored(model, *given))
        yield from zip(some, found.nats.tolist(), found.greedy.tolist(), strict=False)


def score_text(
    model: Transformer,
    tokenizer: Any,
    documents: Iterable[bytes],
    *,
    window: int,
    stride: int,
    batch: int,
    begun: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], Any] = dict,
) -> dict[str, int | float]:
    """Measure bits per byte and perplexity of documents.

    Args:
        begun: what ``keep`` was last given, to go on from there.
        keep: called every few batches with what has been found.

    Raises:
        ValueError: if the window is longer than the model is made for, or there is no
            text.
    """
    _check_length(model, window - 1)
    total = {"documents": 0, "bytes": 0, "tokens": 0}
    found = {"rows": 0, "nats": 0.0, "seconds": 0.0} | (begun or {})
    began = time.monotonic() - found["seconds"]

    def rows() -> Iterator[Row]:
        for text in documents:
            ids = np.insert(tokenizer.encode(text), 0, tokenizer.bos)
            total["documents"] += 1
            total["bytes"] += len(text)
            total["tokens"] += len(ids) - 1
            yield from _rows(ids, window=window, stride=stride)

    how = {"length": window, "batch": batch, "pad": tokenizer.pad}
    rest = islice(rows(), found["rows"], None)
    for number, (_, loss, _) in enumerate(_score(model, rest, **how), 1):
        found["rows"] += 1
        found["nats"] += loss
        if number % (EVERY * batch) == 0:
            keep(found | {"seconds": time.monotonic() - began})
    nats = found["nats"]
    if not total["tokens"]:
        raise ValueError("no text to score; name other data")
    return total | {
        "bits_per_byte": nats / math.log(2) / total["bytes"],
        "perplexity": math.exp(nats / total["tokens"]),
        "loss": nats / total["tokens"],
        "seconds": time.monotonic() - began,
    }


def score_tasks(
    model: Transformer,
    tokenizer: Any,
    tasks: Iterable[str],
    lengths: Iterable[int],
    *,
    questions: int,
    batch: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure the share of questions that are answered, by task and length.

    Raises:
        ValueError: for a task that does not exist, or a length beyond the model's.
    """
    found = []
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"task {name!r}: no such name{near(name, TASKS)}")
        for length in lengths:
            _check_length(model, length)
            rows = _questions(tokenizer, name, length, questions, seed)
            how = {"length": length, "batch": batch, "pad": tokenizer.pad}
            results = list(_score(model, rows, **how))
            right = sum(greedy for _, _, greedy in results)
            nats = sum(loss for _, loss, _ in results) / questions
            share = {"accuracy": right / questions, "answer_nats": nats}
            found.append({"task": name, "tokens": length, **share})
    return found


def _questions(
    tokenizer: Any, name: str, length: int, questions: int, seed: int
) -> Iterator[Row]:
    """Draw questions; the same for every model with the same tokenizer."""
    for number in range(questions):
        rng = np.random.default_rng([seed, length, number])
        size = lambda text: len(tokenizer.prompt(text))  # noqa: E731
        asked = at_length(TASKS[name], rng, size, tokens=length - 4)
        question, answer = tokenizer.prompt(asked.text), tokenizer.encode(asked.answer)
        ids = np.concatenate([question, answer])[:length]
        weights = (np.arange(len(ids)) >= len(question)).astype(np.float32)
        yield Row(ids, weights)


def _check_length(model: Transformer, tokens: int) -> None:
    most = model.config.context_length
    if most is not None and tokens > most:
        raise ValueError(
            f"{tokens} tokens at a time: the model is made for {most}"
            " (model.context_length); take a shorter window"
        )


def _table(report: dict[str, Any]) -> str:
    """Lay a report out for people."""
    lines = [f"{k:<16}{v:>14,.4g}" for k, v in report.get("text", {}).items()]
    for row in report.get("tasks", ()):
        share = f"{row['accuracy']:>7.1%}   {row['answer_nats']:.3g} nats"
        lines.append(f"{row['task']:<20}{row['tokens']:>7} tokens {share}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsejax.evaluate")
    parser.add_argument("--workdir", type=Path, help="of a trained run")
    parser.add_argument("--checkpoint", help="a folder, a GGUF file, package:NAME")
    parser.add_argument("--data.name", dest="name", help="the run's own, or english")
    parser.add_argument("--data.files", dest="files", nargs="+", default=())
    parser.add_argument("--data.text_field", dest="text_field", help="likewise")
    parser.add_argument("--documents", type=int, default=100, help="the first so many")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--stride", type=int, default=256, help="tokens")
    parser.add_argument("--batch", type=int, help="rows; a few a device if not given")
    for name in AXES:
        default = getattr(MeshConfig, name)
        parser.add_argument(f"--mesh.{name}", type=int, default=default)
    parser.add_argument("--tasks", nargs="*", default=(), help=", ".join(TASKS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[256])
    parser.add_argument("--questions", type=int, default=20, help="a task and length")
    parser.add_argument("--json", type=Path, help="where to write the report")
    return parser


def _asked(
    flags: argparse.Namespace, texts: Documents | None, tokenizer: Any
) -> dict[str, Any]:
    """Name all that a report depends on."""
    given = {k: v for k, v in vars(flags).items() if k != "json"}
    home = flags.workdir and flags.workdir / "checkpoints"
    home = home or open_source(flags.checkpoint).path
    given["model"] = listing(home)
    given["tokenizer"] = tokenizer.fingerprint
    given["texts"] = texts and texts.fingerprint
    return json.loads(json.dumps(given, default=str))


def _report(flags: argparse.Namespace, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    model, tokenizer = load_any(flags.workdir, flags.checkpoint, mesh=mesh)
    for length in flags.lengths if flags.tasks else ():
        _check_length(model, length)
    held = open_documents(_data(flags)).validation if flags.documents else None
    kept = Kept(flags.json, _asked(flags, held, tokenizer))
    if held is not None and "text" not in kept.report:
        texts = (held[n] for n in range(min(flags.documents, len(held))))
        how = {"window": flags.window, "stride": flags.stride, "batch": flags.batch}
        how["begun"] = kept.report.get("begun")
        how["keep"] = lambda begun: kept.keep(begun=begun)
        kept.keep(text=score_text(model, tokenizer, texts, **how), begun=None)
    tasks = kept.report.get("tasks", [])
    asked = [(name, length) for name in flags.tasks for length in flags.lengths]
    how = {"questions": flags.questions, "batch": flags.batch}
    for name, length in asked[len(tasks) :]:
        tasks += score_tasks(model, tokenizer, [name], [length], **how)
        kept.keep(tasks=tasks)
    kept.report.pop("begun", None)
    kept.keep(finished=True)
    return kept.report


def _mesh(flags: argparse.Namespace) -> jax.sharding.Mesh:
    """Arrange the devices, or as many as are asked for; set ``batch`` and the sizes."""
    sizes = {name: getattr(flags, f"mesh.{name}") for name in AXES}
    config = convert(MeshConfig, sizes, "--mesh")
    used = None if -1 in sizes.values() else math.prod(sizes.values())
    mesh = make_mesh(config, jax.devices()[:used])
    for name in AXES:
        setattr(flags, f"mesh.{name}", mesh.shape[name])
    share = math.prod(mesh.shape[name] for name in BATCH)
    flags.batch = flags.batch or math.lcm(4, share)
    require(
        flags.batch % share == 0,
        "--batch",
        flags.batch,
        f"must be divisible by data x fsdp x expert = {share}; use fewer devices"
        f" (--mesh.data=1) or take {-(-flags.batch // share) * share}",
    )
    return mesh


def _check(flags: argparse.Namespace) -> None:
    """Find out in no time what would fail after a long one."""
    require(flags.documents >= 0, "--documents", flags.documents, "at least 0")
    for name in ("window", "batch", "questions"):
        value = getattr(flags, name)
        require(value is None or value >= 1, f"--{name}", value, "must be at least 1")
    for length in flags.lengths:
        require(length >= 1, "--lengths", length, "must be at least 1")
    for name in flags.tasks:
        choose("--tasks", name, TASKS)
    if not flags.documents and not flags.tasks:
        raise ConfigError("nothing to measure; give --documents or --tasks")
    if flags.json:
        check_place("--json", flags.json)


def _data(flags: argparse.Namespace) -> DataConfig:
    """Say which text: the run's own, or what is named, held out alike."""
    run = flags.workdir and config_of(flags.workdir).data
    data = run or DataConfig(seq_len=1, batch_size=1)
    if flags.text_field:
        data = dataclasses.replace(data, text_field=flags.text_field)
    if flags.files:
        return dataclasses.replace(data, name="files", files=tuple(flags.files))
    if flags.name:
        return dataclasses.replace(data, name=flags.name, files=())
    return data


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, and write JSON; 2 if it could not be done."""
    flags = _parser().parse_args(argv)
    try:
        _check(flags)
        with jax.set_mesh(mesh := _mesh(flags)):
            report = _report(flags, mesh)
    except (CheckpointError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(_table(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
