"""Compile the real step of a config for hardware that is not there, and judge it."""

import math
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax.data import Batch, ByteTokenizer
from sparsejax.moe import MoEConfig
from sparsejax.moe.traffic import traffic_of
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
    exchange: dict[str, int]  # those of the experts' exchange, as compiled
    expected: dict[str, int]  # and as they follow from its shapes
    seconds: float  # that compiling took

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
        shape = config.data.batch_size, config.data.seq_len + 1
        batch = jax.eval_shape(lambda: Batch(*[np.empty(shape, np.int32)] * 3))
        abstract = jax.eval_shape(step.init, key, batch)
        check_divisible(abstract.params, mesh)
        cut = shardings(abstract, mesh)
        rows = NamedSharding(mesh, PartitionSpec(BATCH))
        whole = NamedSharding(mesh, PartitionSpec())
        _, train, _ = compiled(step, cut, rows, whole)
        start = time.perf_counter()
        lowered = train.trace(abstract, batch).lower(
            lowering_platforms=(target.platform,)
        )
        executable = lowered.compile()
        seconds = time.perf_counter() - start
    return _judgement(config, target, mesh, abstract, cut, executable, seconds)


def exchange_of(config: Config, mesh: Mesh) -> dict[str, int]:
    """Count, by kind, the bytes that tokens make between experts' chips in a step."""
    model, steps = config.model, config.optim.accumulate
    parts = [mesh.shape[name] for name in (*BATCH, "context")]
    tokens = config.data.batch_size * config.data.seq_len // math.prod(parts) // steps
    found: Counter = Counter()
    for index in range(model.depth):
        layer = model.layer(index).feed_forward
        if isinstance(layer, MoEConfig):
            found += Counter(
                traffic_of(
                    layer,
                    tokens=tokens,
                    width=model.width,
                    devices=mesh.shape["expert"],
                    dtype=model.dtype,
                    remat=model.remat != "none",
                )
            )
    return {kind: size * steps for kind, size in found.items()}


def _judgement(
    config: Config,
    target: Target,
    mesh: Mesh,
    abstract: State,
    cut: State,
    executable: Any,
    seconds: float,
) -> Judgement:
    memory = executable.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    activations = memory.temp_size_in_bytes + outputs
    tokens = config.data.batch_size * config.data.seq_len / len(target.devices)
    counted = cost(config.model, abstract.params, length=config.data.seq_len)
    analysis = executable.cost_analysis() or {}
    text = executable.as_text()
    return Judgement(
        chips=len(target.devices),
        parameters=_share(abstract.params, cut.params),
        optimizer=_share(abstract.opt, cut.opt),
        activations=activations,
        total=memory.argument_size_in_bytes + activations,
        memory=target.memory,
        flops=analysis.get("flops", float("nan")),
        useful_flops=counted.useful_flops * tokens,
        collectives=collective_bytes(text),
        exchange=collective_bytes(text, "exchange"),
        expected=exchange_of(config, mesh),
        seconds=seconds,
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
    lines += [
        f"  of them, exchange: {kind} {found.exchange.get(kind, 0) / gib:.3f} GiB,"
        f" by its shapes {size / gib:.3f} GiB"
        for kind, size in sorted(found.expected.items())
    ]
    lines += [f"compiled in {found.seconds:.0f} s", f"verdict: {verdict}"]
    return "\n".join(lines)


def report(config: Config, name: str) -> int:
    """Compile, print the judgement, and return 0 if it fits, else 1."""
    found = judge(config, describe(name))
    sys.stdout.write(text_of(name, found) + "\n")
    return 0 if found.fits else 1
