"""What our training costs beside what it must: three ratios, each from one run.

    python -m sparsejax.bench train

``loop``: steps per second of the whole loop, reading and logging included, over those
of ``bare.py``, which has its batches on the device already; in turns of a few steps.
``input``: tokens that the data of the quickstart gives per second over those that its
step uses up. ``depth``: seconds from nothing compiled to one step taken, of 24 layers
over 4. ``pages``: seconds of a step of the quickstart without huge pages over those
with them, each in a process of its own. Some minutes on two cores, if nothing else
runs there.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from sparsejax.bench import bare
from sparsejax.bench.table import (
    HUGE,
    ROOT,
    markdown,
    provenance,
    read_rows,
    write_rows,
)
from sparsejax.config import convert, read
from sparsejax.data import Batch, open_data
from sparsejax.sharding import MeshConfig
from sparsejax.sharding.mesh import make_mesh
from sparsejax.train.config import Config
from sparsejax.train.distributed import Process
from sparsejax.train.loop import Trainer, _Loop
from sparsejax.train.step import Step
from sparsejax.tree import leaves
from sparsejax.typing import PyTree

COLUMNS = {
    "measure": "measure",
    "ours": "ours",
    "reference": "reference",
    "unit": "unit",
    "ratio": "ratio",
    "low": "least",
    "high": "most",
    "target": "target",
}
SMALL = {"width": 64, "heads": 4, "kv_heads": 2}  # of the models that depth compares
SHALLOW, DEEP = 4, 24


class Comparison(NamedTuple):
    """A quantity and what it is held to, measured side by side several times."""

    measure: str
    unit: str
    ours: list[float]
    reference: list[float]
    target: str = ""  # of the ratio

    def row(self) -> dict[str, str]:
        """Give the medians: a ratio is taken within a pair, before the median."""
        ratios = [a / b for a, b in zip(self.ours, self.reference, strict=True)]
        return {
            "measure": self.measure,
            "ours": f"{statistics.median(self.ours):.4g}",
            "reference": f"{statistics.median(self.reference):.4g}",
            "unit": self.unit,
            "ratio": f"{statistics.median(ratios):.3f}",
            "low": f"{min(ratios):.3f}",
            "high": f"{max(ratios):.3f}",
            "target": self.target,
        }


def bare_parameters(params: PyTree, vocabulary: int) -> PyTree:
    """Copy the dense model's parameters into the nested dict of ``bare.py``."""
    found: dict[str, Any] = {"layers": {}}
    for path, value in leaves(params).items():
        name = path.removesuffix("/scale").split("/")[-1]
        inside = found["layers"] if "/blocks/" in path else found
        inside[name] = jnp.copy(value)
    found["embedding"] = found["embedding"][:vocabulary]
    return found


def bare_optimizer(config: Config) -> optax.GradientTransformation:
    """Build the bare loop's optimiser with the numbers of the dense config."""
    warmup, steps = config.optim.warmup, config.train.steps
    return bare.make_optimizer(config.optim.learning_rate, warmup=warmup, steps=steps)


def bare_step(
    config: Config, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Build the bare loop's step with the numbers of the dense config."""
    block = config.model.attention.block_q
    return bare.make_step(optimizer, length=config.data.seq_len, block=block)


class Turns:
    """Called after each of our steps, lets the bare loop take its turn, and times both.

    A turn of ours ends with a step that is logged, for which the loop waits anyway; the
    first turns compile, and count for nothing.
    """

    def __init__(self, config: Config, params: PyTree, *, steps: int, rounds: int):
        self.steps, self.rounds = steps, rounds
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.losses: list[Any] = []
        data = open_data(config.data, seed=config.seed)
        count = steps * (rounds + 1)
        batches = [next(data.train) for _ in range(count)]
        data.close()
        self._batches = iter([jax.tree.map(jnp.asarray, batch) for batch in batches])
        self._parameters = bare_parameters(params, data.tokenizer.vocab_size)
        optimizer = bare_optimizer(config)
        self._opt = optimizer.init(self._parameters)
        self._step = bare_step(config, optimizer)
        self._taken = 0
        self._began = time.perf_counter()

    def __call__(self) -> bool:
        """Say whether all turns are over; to be given to the loop as ``stopping``."""
        self._taken += 1
        if self._taken % self.steps:
            return False
        ours, began = self.seconds[0], time.perf_counter()
        ours.append(began - self._began)
        self._turn()
        self._began = time.perf_counter()
        self.seconds[1].append(self._began - began)
        return len(ours) > self.rounds

    def _turn(self) -> None:
        for _ in range(self.steps):
            self._parameters, self._opt, loss = self._step(
                self._parameters, self._opt, next(self._batches)
            )
            self.losses.append(loss)
        jax.block_until_ready((self._parameters, self._opt, loss))


def loop_over_bare(config: Config, *, steps: int, rounds: int) -> Comparison:
    """Run our loop and the bare one in turns of ``steps`` steps.

    Raises:
        ValueError: if ``steps`` is no multiple of the steps between two log lines.
    """
    if steps % config.train.log_every:
        raise ValueError(
            f"steps={steps}: must be a multiple of train.log_every="
            f"{config.train.log_every}, so that each turn ends with a logged step"
        )
    never = steps * (rounds + 1) + 1
    length = max(never, config.train.steps)
    change = {"steps": length, "eval_every": length, "save_every": length}
    train = dataclasses.replace(config.train, **change)
    config = dataclasses.replace(config, train=train)
    with tempfile.TemporaryDirectory() as folder, _one_device() as mesh:
        with contextlib.redirect_stderr(io.StringIO()):  # its speeds count our pauses
            loop = _Loop(Trainer(config, mesh), Path(folder), Process(0, 1))
        try:
            state = loop.start()
            turns = Turns(config, state.params, steps=steps, rounds=rounds)
            loop.run(state, turns)
        finally:
            loop.close()
    ours, reference = ([steps / x for x in times[1:]] for times in turns.seconds)
    return Comparison("loop", "steps/s", ours, reference, ">= 0.95")


def input_over_use(config: Config, *, steps: int) -> Comparison:
    """Read as many batches as a run does, from the first on; then only compute."""
    with _one_device() as mesh:
        trainer = Trainer(config, mesh)
        batches = config.train.steps
        tokens = config.data.batch_size * config.data.seq_len
        batch = next(trainer.data.train)  # starts what reads ahead
        began = time.perf_counter()
        for _ in range(batches):
            batch = next(trainer.data.train)
        read = batches * tokens / (time.perf_counter() - began)
        trainer.data.close()
        state = trainer.init()
        for taken in range(steps + 2):
            if taken == 2:
                jax.block_until_ready(state)
                began = time.perf_counter()
            state, _ = trainer.take_step(state, batch)
        jax.block_until_ready(state)
        used = steps * tokens / (time.perf_counter() - began)
    return Comparison("input", "tokens/s", [read], [used], ">= 5")


def step_seconds(steps: int) -> float:
    """Take steps of the quickstart on one batch; the median of their seconds."""
    with _one_device() as mesh:
        trainer = Trainer(_config("quickstart"), mesh)
        batch = next(trainer.data.train)
        trainer.data.close()
        state, seconds = trainer.init(), []
        for _ in range(steps + 2):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(trainer.take_step(state, batch))
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def small_over_huge(*, steps: int, rounds: int) -> Comparison:
    """Take steps in processes whose memory comes in small and in huge pages, in turns.

    What a step sets aside is given back at its end, and asked for again page by page.
    """
    program = f"from {__name__} import step_seconds as s; print(s({steps}))"

    def seconds(tunables: str) -> float:
        told = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"GLIBC_TUNABLES": tunables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(told.stdout)

    pairs = [(seconds(""), seconds(HUGE)) for _ in range(rounds)]
    small, huge = zip(*pairs, strict=True)
    return Comparison("pages", "s", [*small], [*huge])


def deep_over_shallow(config: Config, *, rounds: int) -> list[Comparison]:
    """Compile and take the first step of a deep and of a shallow model, in turns."""
    attention = dataclasses.replace(config.model.attention, block_q=32, block_kv=32)

    def at(depth: int) -> Config:
        model = dataclasses.replace(
            config.model, depth=depth, attention=attention, **SMALL
        )
        data = dataclasses.replace(config.data, seq_len=64, batch_size=4)
        return dataclasses.replace(config, model=model, data=data)

    with _no_cache():
        first_step(at(SHALLOW))  # what a process does once is done now
        pairs = [(first_step(at(DEEP)), first_step(at(SHALLOW))) for _ in range(rounds)]
    return [
        Comparison(
            f"depth: {part}",
            "s",
            [deep[part] for deep, _ in pairs],
            [shallow[part] for _, shallow in pairs],
            "<= 1.3" if part == "first step" else "",
        )
        for part in pairs[0][0]
    ]


def first_step(config: Config) -> dict[str, float]:
    """Seconds to the first step of a fresh process, part by part.

    ``first step`` is the sum of its trace, lowering, compilation and execution; what
    comes before it, building the ``Step`` and drawing the parameters, is apart.
    """
    jax.clear_caches()
    seconds: dict[str, float] = {}

    def timed(part: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        seconds[part] = time.perf_counter() - began
        return result

    shape = config.data.batch_size, config.data.seq_len + 1
    at = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(at % 256, np.ones(shape, np.int32), at)
    step = timed("build", Step, config, 256, np.ones(256, np.int32))
    state = timed("init", jax.jit(step.init), jax.random.key(0))
    traced = timed("trace", jax.jit(step.train, donate_argnums=0).trace, state, batch)
    lowered = timed("lower", traced.lower)
    compiled = timed("compile", lowered.compile)
    timed("run", compiled, state, batch)
    parts = ("trace", "lower", "compile", "run")
    return {"first step": sum(seconds[part] for part in parts)} | seconds


@contextlib.contextmanager
def _one_device() -> Iterator[jax.sharding.Mesh]:
    """The bare loop knows nothing of meshes, so ours gets one device too."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Compile for real: nothing is read from, or written to, the cache on disk."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks for the flag only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _config(name: str) -> Config:
    return convert(Config, read(ROOT / "configs" / f"{name}.py"))


def measured(flags: argparse.Namespace) -> Iterator[Comparison]:
    """Measure the parts that the flags name."""
    if "loop" in flags.parts:
        yield loop_over_bare(_config("dense"), steps=flags.steps, rounds=flags.rounds)
    if "input" in flags.parts:
        yield input_over_use(_config("quickstart"), steps=flags.steps)
    if "depth" in flags.parts:
        yield from deep_over_shallow(_config("dense"), rounds=flags.repeats)
    if "pages" in flags.parts:
        yield small_over_huge(steps=flags.steps, rounds=flags.repeats)


def main(argv: list[str]) -> int:
    """Measure, replace what was measured before, and print the table."""
    parts = ("loop", "input", "depth", "pages")
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench train")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loop")
    parser.add_argument("--repeats", type=int, default=2, help="of new processes")
    flags = parser.parse_args(argv)
    rows = []
    for comparison in measured(flags):
        rows.append(comparison.row() | provenance())
        sys.stderr.write("{measure}: {ratio}\n".format(**rows[-1]))
    new = {row["measure"] for row in rows}
    kept = [row for row in read_rows("train") if row["measure"] not in new]
    write_rows("train", [*kept, *rows])
    sys.stdout.write(markdown([*rows], COLUMNS) + "\n")
    return 0
