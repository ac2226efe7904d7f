"""A checkpoint as step 0 of a run, to train on, to sample from, to evaluate."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from sparsejax.config import ConfigError, convert, read, to_dict
from sparsejax.data.tokenizer_file import JSON
from sparsejax.interop.export import appears
from sparsejax.interop.fields import differences
from sparsejax.interop.load import Source, load_model
from sparsejax.interop.pretrained import tokenizer_of
from sparsejax.nn.transformer import Transformer
from sparsejax.train.config import Config
from sparsejax.train.loop import Trainer
from sparsejax.train.step import State
from sparsejax.train.trained import alone, begun, mesh_of, write_start

__all__ = ["begin"]

SEQUENCE = 512  # tokens of a row, where no config says otherwise


def begin(source: Source, out: Path, *, config: Path | None = None) -> Config:
    """Write a run whose first checkpoint is the pretrained model.

    The folder appears whole or not at all. Training goes on in it with the config that
    it then holds.

    Args:
        source: of model and tokenizer.
        out: a workdir that is not there yet.
        config: a config file of the same model, for data, optimiser and length; one of
            English text if there is none.

    Raises:
        ConfigError: if the model or the tokenizer is not the config's, the checkpoint
            cannot be read, or ``out`` is there.
    """
    tokenizer = tokenizer_of(source)
    given = convert(Config, read(config)) if config else None
    mesh = alone() if given is None else mesh_of(given.mesh)
    with jax.set_mesh(mesh):
        model = load_model(source, mesh=mesh)
    vocabulary = tokenizer.vocab_size
    experiment = given or convert(Config, _usual(model, out, vocabulary))
    _check(experiment, model, config, out)
    with appears(out) as draft:
        for name, text in source.files.items():
            (draft / name).write_text(text, encoding="utf-8")
        _write(experiment, model, draft, mesh)
    return experiment


def _usual(model: Transformer, out: Path, vocabulary: int) -> dict[str, Any]:
    sequence = min(SEQUENCE, model.config.context_length or SEQUENCE)
    values = to_dict(model.config)
    block = next(b for b in (128, 64, 32, 16, 8, 4, 2, 1) if sequence % b == 0)
    values["attention"] |= {"block_q": block, "block_kv": block}
    data = {"seq_len": sequence, "batch_size": 4, "vocab_size": vocabulary}
    data |= {"tokenizer": "file", "tokenizer_file": str(out / JSON)}
    optim = {"name": "adamw", "learning_rate": 1e-5, "warmup": 10, "clip": 1.0}
    return {
        "data": data,
        "model": values,
        "optim": optim,
        "train": {"steps": 100, "log_every": 5, "eval_every": 25, "eval_batches": 4},
    }


def _check(
    experiment: Config, model: Transformer, config: Path | None, out: Path
) -> None:
    wrong = differences(experiment.model, model.config)
    if wrong:
        raise ConfigError(
            f"--config={config}: not the model of the checkpoint: {'; '.join(wrong)}"
        )
    data, expected = experiment.data, out / JSON
    file = Path(data.tokenizer_file or "").absolute()
    if data.tokenizer_file is None or file != expected.absolute():
        raise ConfigError(
            f"--config={config}: data.tokenizer={data.tokenizer!r},"
            f" data.tokenizer_file={data.tokenizer_file!r}; must be 'file' and"
            f" {str(expected)!r}, where the checkpoint's tokenizer is written"
        )
    if data.vocab_size != model.vocabulary:
        raise ConfigError(
            f"--config={config}: data.vocab_size={data.vocab_size}; the model has"
            f" {model.vocabulary} ids"
        )


def _write(config: Config, model: Transformer, draft: Path, mesh: Mesh) -> None:
    """Save the model, used up by it, as step 0; its tokenizer is still in the draft."""
    _, *parts = nnx.split(model, nnx.Param, ...)

    def start(trainer: Trainer) -> State:
        return begun(trainer, mesh, *parts)

    data = dataclasses.replace(config.data, tokenizer_file=str(draft / JSON))
    write_start(draft, config, start, data=data, mesh=mesh)
    (draft / ".lock").unlink(missing_ok=True)
