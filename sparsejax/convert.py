r"""Conversions of trained runs: a checkpoint in, a checkpoint or a file out.

    python -m sparsejax.convert upcycle --workdir=RUN --experts=8 --per_token=2 \
        --out=NEW
    python -m sparsejax.convert finetune --workdir=RUN --out=NEW \
        --config.data.name=countries --config.optim.tables=sgd \
        --config.optim.table_rows=500
    python -m sparsejax.convert table --workdir=RUN --kind=balanced --experts=8 \
        --out=FILE

``upcycle`` begins a run of routed experts with the weights of a dense one; going on
with it is training with the same config but for ``model.ffn``, in the new workdir. Both
models are cut over the run's own mesh, if there are devices enough.
``finetune`` begins a run of another config, on other text say, with the weights of a
trained one. With ``optim.table_rows`` it counts which rows of its memories the old text
reads, and freezes all else unless ``optim.rates`` are given: what a step then moves are
the rows that are specific to its batch. With ``--config.masked.…`` the first masks are
chosen among the trained weights, by the plan's criterion unless its
``initial_criterion`` is given. ``python train.py --config=NEW/config.json
--workdir=NEW`` goes on.
``table`` writes the expert of each id for ``--config.model.ffn.router=hash_table``.
"""

import argparse
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.config import (
    ConfigError,
    convert,
    near,
    override,
    require,
    to_dict,
)
from sparsejax.data import open_data
from sparsejax.masked import MaskedConfig
from sparsejax.memory.specific import rarity
from sparsejax.moe import TABLES, MoEConfig
from sparsejax.nn.config import GatedConfig
from sparsejax.nn.transformer import Transformer
from sparsejax.nn.upcycle import upcycled
from sparsejax.sharding import shardings
from sparsejax.sharding.mesh import check_divisible
from sparsejax.train.checkpoint import CheckpointError
from sparsejax.train.config import Config
from sparsejax.train.loop import Trainer
from sparsejax.train.optim import OptimConfig
from sparsejax.train.step import State
from sparsejax.train.tables import Tables, TableState
from sparsejax.train.trained import begun, config_of, load, mesh_of, write_start
from sparsejax.train.workdir import check_place, write_atomically
from sparsejax.typing import Array, PyTree

__all__ = ["finetune", "main", "upcycle"]


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
        ConfigError: if the run is not dense, moves too little to train routers, or
            there is one in ``out``.
    """
    before = config_of(workdir)
    _check_moves(before, workdir)
    mesh = mesh_of(before.mesh)
    model, _ = load(workdir, mesh=mesh)
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
    config = dataclasses.replace(
        before, model=dataclasses.replace(before.model, ffn=ffn), masked=None
    )
    key = jax.random.key(config.seed)

    def made(model: Transformer) -> Any:
        sparse = upcycled(model, config.model, key=key, drop=drop)
        return nnx.split(sparse, nnx.Param, ...)[1:]

    parts = _over(mesh, made, model)
    write_start(out, config, lambda x: begun(x, mesh, *parts), mesh=mesh)
    return config


def _check_moves(before: Config, workdir: Path) -> None:
    """Refuse a run whose optimiser would let new routers stay as they are drawn."""
    if before.optim.frozen:
        raise ConfigError(
            f"--workdir={workdir}: optim.lora or table_rows lets new routers rest;"
            " set both to none by finetune, and take that run"
        )


def _over(
    mesh: jax.sharding.Mesh, made: Callable[[Transformer], Any], model: Transformer
) -> Any:
    """Make parameters and variables of a model, cut over a mesh as they are made."""
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(made, model)
        check_divisible(abstract[0], mesh)
        return jax.jit(made, out_shardings=shardings(abstract, mesh))(model)


def finetune(
    workdir: Path, out: Path, *, batches: int, overrides: Sequence[str]
) -> Config:
    """Write, as step 0 of a new run, a run's model under another config.

    Args:
        workdir: of the run; its newest whole checkpoint is read.
        out: of the new run.
        batches: of the run's own training text in which reads of rows are counted.
        overrides: of the run's config, as ``--config.path=value``.

    Raises:
        ConfigError: if an override is none or changes the model, or masks do not fit
            it; if there is a run in ``out``.
        ValueError: if nothing is known yet of what first masks are to be chosen by.
    """
    before = config_of(workdir)
    config = _overridden(before, overrides)
    if config.model != before.model:
        raise ConfigError("--config.model: must stay what it is; its weights are kept")
    model, _ = load(workdir)
    params = nnx.state(model, nnx.Param)
    config = dataclasses.replace(config, optim=_followed(before, config, params))

    def begin(trainer: Trainer) -> State:
        _, params, variables = nnx.split(model, nnx.Param, ...)
        state = trainer.step.begin(params, variables, *trainer.first)
        if config.optim.table_rows is None:
            return state
        return _with_rarity(state, _seen(before, trainer, state, batches), batches)

    write_start(out, config, begin)
    return config


def _overridden(before: Config, overrides: Sequence[str]) -> Config:
    """Change a config; masks of trained weights are not random unless it is said."""
    values = to_dict(before)
    usual = MaskedConfig.initial_criterion
    if before.masked is not None and before.masked.initial_criterion == usual:
        del values["masked"]["initial_criterion"]
    for flag in overrides:
        path, equals, text = flag.removeprefix("--config.").partition("=")
        if not equals or not flag.startswith("--config."):
            raise ConfigError(f"{flag}: not of the form --config.PATH=VALUE")
        override(Config, values, path, text)
    config = convert(Config, values)
    if (plan := config.masked) is None or "initial_criterion" in values["masked"]:
        return config
    plan = dataclasses.replace(plan, initial_criterion=plan.criterion)
    return dataclasses.replace(config, masked=plan)


def _followed(before: Config, config: Config, params: PyTree) -> OptimConfig:
    """Freeze all but tables if few rows are to move; not for that of a run before."""
    optim, last = config.optim, before.optim
    if last.table_rows is not None and optim.rates == _frozen(before, params).rates:
        optim = dataclasses.replace(optim, rates={})
    if optim.table_rows is None or optim.rates:
        return optim
    return _frozen(config, params)


def _frozen(config: Config, params: PyTree) -> OptimConfig:
    """Let only the tables move, and nothing decay."""
    optim = dataclasses.replace(config.optim, weight_decay=0.0)
    paths = Tables(optim, config.train.steps, params).rates
    tables = "|".join(f"^{re.escape(path)}$" for path in paths)
    return dataclasses.replace(optim, rates={tables: 1.0, "": 0.0})


def _seen(
    before: Config, trainer: Trainer, state: State, batches: int
) -> dict[str, Array]:
    """Count, for each row of each table, the batches of a run's text that read it."""
    data = open_data(before.data, seed=before.seed)
    reads = jax.jit(trainer.step.reads)
    seen: dict[str, Array] = {}
    for _ in range(batches):
        counts = reads(state, next(data.train))
        for path, count in counts.items():
            now = (count > 0).astype(jnp.int32)
            seen[path] = seen[path] + now if path in seen else now
    data.close()
    return seen


def _with_rarity(state: State, seen: dict[str, Array], batches: int) -> State:
    tables: TableState = state.opt.tables
    rare = {
        path: kept.replace(rarity(seen[path], batches).reshape(kept.get_value().shape))
        for path, kept in tables.rarity.items()
    }
    return state._replace(opt=state.opt._replace(tables=tables._replace(rarity=rare)))


def table(workdir: Path, out: Path, *, kind: str, experts: int, batches: int) -> None:
    """Write a hash table made of a run's ids: counted in its data, or embedded by it.

    Raises:
        ConfigError: if there is no such kind of table.
        FieldError: if ``out`` is in no folder that is there.
    """
    if kind not in TABLES:
        raise ConfigError(f"--kind={kind}: no such table{near(kind, TABLES)}")
    check_place("--out", out)
    model, tokenizer = load(workdir)
    ids = tokenizer.vocab_size
    evidence = {
        "random": lambda: ids,
        "balanced": lambda: _counts(workdir, ids, batches),
        "clustered": lambda: np.asarray(model.embedding[...])[:ids],
        "dispersed": lambda: np.asarray(model.embedding[...])[:ids],
    }
    made = io.BytesIO()
    np.save(made, TABLES[kind](evidence[kind](), experts))
    write_atomically(out, made.getvalue())


def _counts(workdir: Path, ids: int, batches: int) -> np.ndarray:
    """Count each id in the first batches of a run's training data."""
    data = open_data((before := config_of(workdir)).data, seed=before.seed)
    counts = np.zeros(ids, np.int64)
    for _ in range(batches):
        batch = next(data.train)
        tokens = np.asarray(batch.tokens)[np.asarray(batch.segments) > 0]
        counts += np.bincount(tokens, minlength=ids)
    data.close()
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsejax.convert")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("upcycle", help="experts from a dense run")
    two = commands.add_parser("table", help="the expert of each id")
    three = commands.add_parser("finetune", help="a run that begins with another's end")
    for command in (one, two, three):
        command.add_argument("--workdir", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
    for command in (one, two):
        command.add_argument("--experts", type=int, required=True)
    three.add_argument("--batches", type=int, default=100, help="to count reads in")
    one.add_argument("--per_token", type=int, required=True)
    one.add_argument("--drop", type=float, default=0.0, help="share drawn again")
    one.add_argument("--no-renormalize", dest="renormalize", action="store_false")
    two.add_argument("--kind", required=True, help=", ".join(TABLES))
    two.add_argument("--batches", type=int, default=100, help="to count ids in")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert; 2 if it could not be done."""
    known, overrides = _parser().parse_known_args(argv)
    flags = vars(known)
    name = flags.pop("command")
    command = {"upcycle": upcycle, "table": table, "finetune": finetune}[name]
    if name == "finetune":
        flags["overrides"] = overrides
    elif overrides:
        _parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        for flag in ("experts", "per_token", "batches"):
            value = flags.get(flag, 1)
            require(value >= 1, f"--{flag}", value, "must be at least 1")
        command(flags.pop("workdir"), flags.pop("out"), **flags)
    except (CheckpointError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
