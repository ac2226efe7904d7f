"""Compile the real step of a config for hardware that is not there, and judge it."""

import math
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.data import Batch, ByteTokenizer
from sparsejax.nn.cost import cost
from sparsejax.partition import BATCH
from sparsejax.sharding.hlo import collective_bytes
from sparsejax.sharding.mesh import check_divisible, make_mesh, shardings
from sparsejax.sharding.targets import Target, describe
from sparsejax.train.config import Config
from sparsejax.train.step import State, Step, compiled
from sparsejax.typing import PyTree


class Judgement(NamedTuple):
    """What one chip must hold and do in a step; sizes are bytes."""

    chips: int
    parameters: int
    optimizer: int
    activations: int  # everything that lives only within the step
    total: int
    memory: int  # that a chip has
    flops: float  # that the compiler counts; a loop's body may count once
    useful_flops: float  # of a chip's share of the step
    collectives: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether a chip can hold it."""
        return self.total <= self.memory


def _share(tree: PyTree, cut: PyTree) -> int:
    """Bytes of one device's pieces."""

    def size(x: Any, sharding: Any) -> int:
        shape = sharding.shard_shape(x.shape)
        return math.prod(shape) * np.dtype(x.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, cut)))


def judge(config: Config, target: Target) -> Judgement:
    """Compile the config's step for the target.

    Raises:
        ConfigError: if the mesh does not match the target or cannot cut the model.
    """
    mesh = make_mesh(config.mesh, target.devices)
    tokens = {"bytes": ByteTokenizer.vocab_size, "bpe": config.data.vocab_size}
    vocabulary = tokens[config.data.tokenizer]
    # Nothing may be computed, only traced, once the mesh of absent devices is ambient.
    step = Step(config, vocabulary, np.ones(vocabulary, np.int32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(step.init, key)
        check_divisible(abstract.params, mesh)
        cut = shardings(abstract, mesh)
        rows = NamedSharding(mesh, PartitionSpec(BATCH))
        whole = NamedSharding(mesh, PartitionSpec())
        shape = config.data.batch_size, config.data.seq_len + 1
        batch = jax.eval_shape(lambda: Batch(*[np.empty(shape, np.int32)] * 3))
        _, train, _ = compiled(step, cut, rows, whole)
        lowered = train.trace(abstract, batch).lower(
            lowering_platforms=(target.platform,)
        )
        executable = lowered.compile()
    return _judgement(config, target, abstract, cut, executable)


def _judgement(
    config: Config, target: Target, abstract: State, cut: State, executable: Any
) -> Judgement:
    memory = executable.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    activations = memory.temp_size_in_bytes + outputs
    tokens = config.data.batch_size * config.data.seq_len / len(target.devices)
    counted = cost(config.model, abstract.params, length=config.data.seq_len)
    analysis = executable.cost_analysis() or {}
    return Judgement(
        chips=len(target.devices),
        parameters=_share(abstract.params, cut.params),
        optimizer=_share(abstract.opt, cut.opt),
        activations=activations,
        total=memory.argument_size_in_bytes + activations,
        memory=target.memory,
        flops=analysis.get("flops", float("nan")),
        useful_flops=counted.useful_flops * tokens,
        collectives=collective_bytes(executable.as_text()),
    )


def text_of(name: str, found: Judgement) -> str:
    """Lay a judgement out for reading."""
    gib = 2.0**30
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines = [
        f"{name}: {found.chips} chips, per chip:",
        f"  parameters       {found.parameters / gib:10.3f} GiB",
        f"  optimiser        {found.optimizer / gib:10.3f} GiB",
        f"  activations      {found.activations / gib:10.3f} GiB",
        f"  total            {found.total / gib:10.3f} GiB of"
        f" {found.memory / gib:.0f} GiB",
        f"  useful FLOPs     {found.useful_flops:10.3e} a step",
        f"  compiler's FLOPs {found.flops:10.3e} (a loop's body may count once)",
    ]
    for kind, size in sorted(found.collectives.items()):
        lines.append(f"  {kind:<17}{size / gib:10.3f} GiB a step")
    lines.append(f"verdict: {verdict}")
    return "\n".join(lines)


def report(config: Config, name: str) -> int:
    """Compile, print the judgement, and return 0 if it fits, else 1."""
    found = judge(config, describe(name))
    sys.stdout.write(text_of(name, found) + "\n")
    return 0 if found.fits else 1
