"""Models of trained runs, from their workdirs."""

import json
from pathlib import Path
from typing import Any

import jax

from sparsejax.config import ConfigError, convert
from sparsejax.nn.transformer import Transformer
from sparsejax.sharding import MeshConfig, make_mesh
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import Config
from sparsejax.train.loop import Trainer

__all__ = ["alone", "load"]


def alone() -> jax.sharding.Mesh:
    """Make a mesh of one device, whatever the run was trained on."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def load(workdir: Path) -> tuple[Transformer, Any]:
    """Restore the newest whole checkpoint of a run: its model and its tokenizer.

    Raises:
        ConfigError: if the workdir holds no run or no checkpoint.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise ConfigError(f"--workdir={workdir}: no run here (config.json is missing)")
    config = convert(Config, json.loads(file.read_text())["config"])
    mesh = alone()
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        trainer.data.train.close()
        checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
        found = checkpoints.restore(trainer.abstract)
        checkpoints.close()
        if found is None:
            raise ConfigError(f"--workdir={workdir}: no checkpoint yet; train first")
        return trainer.step.model(found.state), trainer.data.tokenizer
