"""Models of trained runs, from their workdirs, and runs that begin with a model."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sparsejax import tree
from sparsejax.config import ConfigError, convert, fingerprint, to_dict
from sparsejax.data import DataConfig
from sparsejax.nn.transformer import Transformer
from sparsejax.sharding import MeshConfig, make_mesh, shardings
from sparsejax.sharding.mesh import check_divisible
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import FREE, Config
from sparsejax.train.loop import Trainer
from sparsejax.train.step import State, Step
from sparsejax.train.workdir import open_workdir
from sparsejax.typing import PyTree

__all__ = ["alone", "begun", "config_of", "load", "mesh_of", "write_start"]


def alone() -> jax.sharding.Mesh:
    """Make a mesh of one device, whatever the run was trained on."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def mesh_of(config: MeshConfig) -> jax.sharding.Mesh:
    """Cut parameters as the config does, without its copies for parts of a batch.

    On fewer devices than that takes, all is on the first.
    """
    axes = to_dict(config) | {"data": 1}
    size = math.prod(axes.values())
    known = jax.devices()
    if abs(size) > len(known):
        return alone()
    return make_mesh(convert(MeshConfig, axes), None if size < 0 else known[:size])


def begun(trainer: Trainer, mesh: jax.sharding.Mesh, *parts: PyTree) -> State:
    """Begin a run with parameters and variables, used up by it, cut over a mesh."""
    cut = {"out_shardings": shardings(trainer.abstract, mesh)}
    begin = jax.jit(trainer.step.begin, donate_argnums=(0, 1), **cut)
    return begin(*parts, *trainer.first)


def config_of(workdir: Path) -> Config:
    """Read the config of a run.

    Raises:
        ConfigError: if the workdir holds no run.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise ConfigError(f"--workdir={workdir}: no run here (config.json is missing)")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--workdir={workdir}: no run here (config.json is not a run's); a"
            " checkpoint of another program becomes a run by"
            " python -m sparsejax.interop import"
        ) from None
    return convert(Config, values)


def write_start(
    out: Path,
    config: Config,
    begin: Callable[[Trainer], State],
    *,
    data: DataConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Save a state as step 0 of a new run, its data at the start.

    Args:
        out: the run's workdir.
        config: of the run.
        begin: gives the state, under the mesh.
        data: what is read now, if not yet what the run will read.
        mesh: on which the state is made; of one device if there is none.
    """
    values, mesh = to_dict(config), alone() if mesh is None else mesh
    home = open_workdir(out, values, fingerprint(config), free=FREE)
    with home, jax.set_mesh(mesh):
        read = dataclasses.replace(config, data=data or config.data)
        trainer = Trainer(read, alone())  # no batch of the run's is cut here
        position = trainer.data.train.state()
        trainer.data.train.close()
        state = begin(trainer)
        checkpoints = Checkpoints(home.path / "checkpoints", keep=1)
        checkpoints.save(0, state, data=position, config=values, blocking=True)
        checkpoints.close()


def load(
    workdir: Path, *, mesh: jax.sharding.Mesh | None = None
) -> tuple[Transformer, Any]:
    """Restore the newest whole checkpoint of a run: its model and its tokenizer.

    Only what the model is made of is read and checked: no moments of an optimiser.

    Args:
        workdir: of the run.
        mesh: over which the parameters are cut as in training; the first device alone
            if there is none.

    Raises:
        ConfigError: if the workdir holds no run or no checkpoint, or the mesh cannot
            cut a parameter.
    """
    config, mesh = config_of(workdir), alone() if mesh is None else mesh
    with jax.set_mesh(mesh):
        trainer = Trainer(config, alone())  # no batch of the run's is cut here
        trainer.data.train.close()
        check_divisible(trainer.abstract.params, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
        state = _cut(trainer.abstract, mesh)
        found = checkpoints.restore(state, only=_needed(trainer.step, state))
        checkpoints.close()
        if found is None:
            raise ConfigError(f"--workdir={workdir}: no checkpoint yet; train first")
        return trainer.step.model(found.state), trainer.data.tokenizer


def _needed(step: Step, state: PyTree) -> set[str]:
    """Give the paths of what of a state its model is computed from."""
    made = jax.make_jaxpr(lambda state: nnx.state(step.model(state)))(state).jaxpr
    read = {id(x) for x in made.outvars}
    read |= {id(x) for equation in made.eqns for x in equation.invars}
    given = zip(tree.leaves(state), made.invars, strict=True)
    return {path for path, variable in given if id(variable) in read}


def _cut(abstract: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Say how a state lies on a mesh."""
    return jax.tree.map(
        lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut),
        abstract,
        shardings(abstract, mesh),
    )
