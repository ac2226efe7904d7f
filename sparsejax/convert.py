r"""Conversions of trained runs: a checkpoint in, a checkpoint or a file out.

    python -m sparsejax.convert upcycle --workdir=RUN --experts=8 --per_token=2 \
        --out=NEW
    python -m sparsejax.convert table --workdir=RUN --kind=balanced --experts=8 \
        --out=FILE

``upcycle`` begins a run of routed experts with the weights of a dense one; going on
with it is training with the same config but for ``model.ffn``, in the new workdir.
``table`` writes the expert of each id for ``--config.model.ffn.router=hash_table``.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from sparsejax.config import ConfigError, convert, fingerprint, near, to_dict
from sparsejax.moe import TABLES, MoEConfig
from sparsejax.nn.config import GatedConfig
from sparsejax.nn.upcycle import upcycled
from sparsejax.sample import load
from sparsejax.sharding import MeshConfig, make_mesh
from sparsejax.train.checkpoint import CheckpointError, Checkpoints
from sparsejax.train.config import FREE, Config
from sparsejax.train.loop import Trainer
from sparsejax.train.workdir import open_workdir
from sparsejax.typing import PyTree

__all__ = ["main", "upcycle"]


def upcycle(
    workdir: Path,
    out: Path,
    *,
    experts: int,
    per_token: int,
    drop: float = 0.0,
    renormalize: bool = True,
) -> Config:
    """Write, as step 0 of a new run, a dense run's model with experts for its layers.

    Args:
        workdir: of the dense run; its newest whole checkpoint is read.
        out: of the new run.
        experts: how many copies of each feed-forward.
        per_token: how many of them a token visits.
        drop: share of each copy's channels that is drawn again.
        renormalize: whether weights sum to 1; the model begins as the dense one only
            if they do.

    Raises:
        ConfigError: if the run is not dense, or there is one in ``out``.
    """
    model, _ = load(workdir)
    dense = model.config.ffn
    if not isinstance(dense, GatedConfig):
        raise ConfigError(f"--workdir={workdir}: ffn.kind={dense.kind!r}, not 'gated'")
    ffn = MoEConfig(
        experts=experts,
        per_token=per_token,
        hidden=dense.hidden,
        activation=dense.activation,
        router_arguments={} if renormalize else {"renormalize": False},
    )
    before = convert(
        Config, json.loads((workdir / "config.json").read_text())["config"]
    )
    config = dataclasses.replace(
        before, model=dataclasses.replace(before.model, ffn=ffn), masked=None
    )
    key = jax.random.key(config.seed)
    sparse = upcycled(model, config.model, key=key, drop=drop)
    _write(config, nnx.state(sparse, nnx.Param), out)
    return config


def _write(config: Config, params: PyTree, out: Path) -> None:
    """Save parameters as step 0 of a new run, its optimiser and data at the start."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    values = to_dict(config)
    home = open_workdir(out, values, fingerprint(config), free=FREE)
    with home, jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        state = trainer.init()._replace(params=params)
        checkpoints = Checkpoints(home.path / "checkpoints", keep=1)
        position = trainer.data.train.state()
        checkpoints.save(0, state, data=position, config=values, blocking=True)
        checkpoints.close()
        trainer.data.train.close()


def table(workdir: Path, out: Path, *, kind: str, experts: int, batches: int) -> None:
    """Write a hash table made of a run's ids: counted in its data, or embedded by it.

    Raises:
        ConfigError: if there is no such kind of table.
    """
    if kind not in TABLES:
        raise ConfigError(f"--kind={kind}: no such table{near(kind, TABLES)}")
    model, tokenizer = load(workdir)
    ids = tokenizer.vocab_size
    evidence = {
        "random": lambda: ids,
        "balanced": lambda: _counts(workdir, ids, batches),
        "clustered": lambda: np.asarray(model.embedding[...])[:ids],
        "dispersed": lambda: np.asarray(model.embedding[...])[:ids],
    }
    with out.open("wb") as file:
        np.save(file, TABLES[kind](evidence[kind](), experts))


def _counts(workdir: Path, ids: int, batches: int) -> np.ndarray:
    """Count each id in the first batches of a run's training data."""
    values = json.loads((workdir / "config.json").read_text())["config"]
    trainer = Trainer(convert(Config, values), make_mesh(MeshConfig()))
    counts = np.zeros(ids, np.int64)
    for _ in range(batches):
        batch = next(trainer.data.train)
        tokens = np.asarray(batch.tokens)[np.asarray(batch.segments) > 0]
        counts += np.bincount(tokens, minlength=ids)
    trainer.data.train.close()
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsejax.convert")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("upcycle", help="experts from a dense run")
    two = commands.add_parser("table", help="the expert of each id")
    for command in (one, two):
        command.add_argument("--workdir", type=Path, required=True)
        command.add_argument("--experts", type=int, required=True)
        command.add_argument("--out", type=Path, required=True)
    one.add_argument("--per_token", type=int, required=True)
    one.add_argument("--drop", type=float, default=0.0, help="share drawn again")
    one.add_argument("--no-renormalize", dest="renormalize", action="store_false")
    two.add_argument("--kind", required=True, help=", ".join(TABLES))
    two.add_argument("--batches", type=int, default=100, help="to count ids in")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert; 2 if it could not be done."""
    flags = vars(_parser().parse_args(argv))
    command = {"upcycle": upcycle, "table": table}[flags.pop("command")]
    try:
        command(flags.pop("workdir"), flags.pop("out"), **flags)
    except (CheckpointError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
