"""Sample from a trained model: ``python -m sparsejax.sample --workdir=…``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from sparsejax.config import ConfigError, convert
from sparsejax.nn.transformer import Transformer
from sparsejax.sharding import MeshConfig, make_mesh
from sparsejax.train.checkpoint import CheckpointError, Checkpoints
from sparsejax.train.config import Config
from sparsejax.train.loop import Trainer
from sparsejax.train.report import sample_text


def _alone() -> jax.sharding.Mesh:
    """Make the mesh of sampling: one device, whatever the run was trained on."""
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
    mesh = _alone()
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        trainer.data.train.close()
        checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
        found = checkpoints.restore(trainer.abstract)
        checkpoints.close()
        if found is None:
            raise ConfigError(f"--workdir={workdir}: no checkpoint yet; train first")
        return trainer.step.model(found.state), trainer.data.tokenizer


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, load, sample, and write the text to standard output."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.sample")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--tokens", type=int, default=200, help="how many to draw")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus, in (0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    flags = vars(parser.parse_args(argv))
    workdir, prompt = flags.pop("workdir"), flags.pop("prompt")
    try:
        model, tokenizer = load(workdir)
        with jax.set_mesh(_alone()):
            text = sample_text(model, tokenizer, prompt, **flags)
    except (CheckpointError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
