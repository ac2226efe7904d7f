"""The loop: reads batches, takes steps, and writes down what happened.

No mathematics lives here, and no I/O in the step. ``train`` is what ``train.py`` calls.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax.config import ConfigError, fingerprint, to_dict
from sparsejax.data import Batch, Data, merge_states, open_data
from sparsejax.masked import masks_of
from sparsejax.partition import BATCH
from sparsejax.sharding.mesh import check_divisible, make_mesh, shardings
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import FREE, Config
from sparsejax.train.distributed import Process, gather_json, global_batch
from sparsejax.train.mask_plots import drawn
from sparsejax.train.metrics import MetricsLog, Profiler, Progress
from sparsejax.train.report import costs, finish, sample_text
from sparsejax.train.routes import Routes, Visits
from sparsejax.train.step import State, Step, compiled, statistics
from sparsejax.train.workdir import disk_guard, open_workdir

__all__ = ["NonFiniteError", "Trainer", "train"]


class NonFiniteError(RuntimeError):
    """Training produced a number that is not finite."""


class Share(NamedTuple):
    """Which of how many equal parts of every batch a process reads."""

    index: int
    count: int


def batch_share(sharding: NamedSharding, rows: int) -> Share:
    """Find the rows that this process's devices hold of a batch of ``rows``."""
    own = sharding.addressable_devices_indices_map((rows,)).values()
    bounds = {index[0].indices(rows)[:2] for index in own if index is not None}
    first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
    return Share(first // (last - first), rows // (last - first))


class Trainer:
    """A config brought to devices: compiled functions, their shardings, the data."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config = config
        rows = config.data.batch_size // config.optim.accumulate
        pieces = int(np.prod([mesh.shape[name] for name in BATCH]))
        if rows % pieces:
            raise ConfigError(
                f"config.data.batch_size={config.data.batch_size}: a micro-batch of"
                f" {rows} rows must be divisible by the mesh's data x fsdp x expert"
                f" = {pieces}"
            )
        blocks = config.data.seq_len // config.model.attention.block_q
        if blocks % mesh.shape["context"]:
            raise ConfigError(
                f"config.mesh.context={mesh.shape['context']}: must divide the {blocks}"
                " query blocks, data.seq_len / model.attention.block_q"
            )
        self.rows = NamedSharding(mesh, PartitionSpec(BATCH))
        share = batch_share(self.rows, config.data.batch_size)
        self.data: Data = open_data(
            config.data,
            seed=config.seed,
            process_index=share.index,
            process_count=share.count,
        )
        tokenizer = self.data.tokenizer
        self.step = Step(config, tokenizer.vocab_size, tokenizer.token_bytes)
        self.first = self._first_batch()
        # Traced, like the model itself: nothing compiles before all checks are done.
        try:
            abstract = jax.eval_shape(
                lambda *batch: self.step.init(jax.random.key(config.seed), *batch),
                *self.first,
            )
        except ConfigError:
            raise
        except ValueError as error:  # a plan of masks that does not fit this model
            raise ConfigError(f"this config cannot be run: {error}") from error
        check_divisible(abstract.params, mesh)
        self.key = jax.random.key(config.seed)
        self.shardings = shardings(abstract, mesh)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            self.shardings,
        )
        whole = NamedSharding(mesh, PartitionSpec())
        self._init, self._train, self._evaluate = compiled(
            self.step, self.shardings, self.rows, whole
        )

    def _first_batch(self) -> tuple[Batch, ...]:
        """Give the batch that first masks are chosen by; training has it, too."""
        if not self.step.measures:
            return ()
        position = self.data.train.state()
        batch = next(self.data.train)
        self.data.train.restore(position)
        return (batch,)

    def init(self) -> State:
        """Draw a fresh state, each device its own piece."""
        return self._init(self.key, *(global_batch(x, self.rows) for x in self.first))

    def take_step(self, state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        """Take one step on this process's rows; ``state`` is used up."""
        return self._train(state, global_batch(batch, self.rows))

    def evaluate(self, state: State) -> tuple[dict[str, float], Visits | None]:
        """Give loss (nats a token) and bits per byte of the held-out documents.

        Also say which experts tokens of the first batch went to, if there are any.
        """
        total, first = np.zeros(4), None
        for batch in self.data.evaluation(self.config.train.eval_batches):
            sums, visits = self._evaluate(state, global_batch(batch, self.rows))
            total += np.array([float(x) for x in sums])
            first = jax.tree.map(np.asarray, visits) if first is None else first
        nll, _, tokens, size = total
        scores = {
            "eval/loss": nll / tokens,
            "eval/bits_per_byte": nll / (np.log(2) * size),
        }
        return scores, first


def check_finite(state: State, metrics: dict[str, Any]) -> None:
    """Refuse to go on with a state that has met a number that is not finite.

    Raises:
        NonFiniteError: naming the step and the statistic that went first.
    """
    step, index = np.asarray(state.fault).tolist()
    if step >= 0:
        name = statistics(metrics)[index]
        raise NonFiniteError(
            f"step {step}: {name} is not finite (it went first); stopped, and the last"
            " good checkpoint is kept; lower optim.learning_rate or set optim.clip"
        )


@contextlib.contextmanager
def _heard(number: int) -> Iterator[Callable[[], int]]:
    """A signal asks for a clean end; what it was, or 0, is read between steps.

    A second Ctrl-C does what it always does, and a signal that is ignored stays so.
    """
    asked = [0]

    def hear(number: int, _: Any) -> None:
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before)
            # Not through a stream, which may be in the middle of a line of its own.
            os.write(2, b"\nsaving, then stopping; Ctrl-C again stops at once\n")

    before = signal.getsignal(number)
    if before is not signal.SIG_IGN:
        signal.signal(number, hear)
    try:
        yield lambda: asked[-1]
    finally:
        signal.signal(number, before)


class _Loop:
    """One run from where its workdir stands to its last step."""

    def __init__(
        self,
        trainer: Trainer,
        workdir: Path,
        process: Process,
        profiler: Profiler | None = None,
    ) -> None:
        self.trainer, self.workdir, self.process = trainer, workdir, process
        self.config = trainer.config
        every = self.config.train
        self.progress = Progress(every.steps, active=process.index == 0)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=every.keep,
            keep_best=every.keep_best,
            report=self.progress.report,
        )
        self.profiler = profiler or Profiler(None, workdir)
        self.last_scores: dict[str, float] = {}
        self.visits: Visits | None = None  # of the same evaluation
        self.scored = -1  # the step that they are of
        self.began = time.monotonic()

    def start(self) -> State:
        """Take up the newest whole checkpoint, or begin."""
        found = self.checkpoints.restore(self.trainer.abstract)
        step = None
        if found is None:
            state = self.trainer.init()
        else:
            state, step = found.state, found.step
            self.trainer.data.train.restore(found.data)
            self.progress.report(f"resumed from the checkpoint of step {step}")
        self.log = MetricsLog(
            self.workdir, resume_step=step, active=self.process.index == 0
        )
        ffn = self.config.model.ffn
        self.routes = Routes(
            self.workdir / "routes",
            experts=getattr(ffn, "experts", 0),
            step=step,
            active=self.process.index == 0,
        )
        self.began -= self.log.before.get("seconds", 0.0)  # of sessions before
        return state

    def run(self, state: State, stopping: Callable[[], int]) -> tuple[State, int]:
        """Take all remaining steps; also give the signal that has stopped it, or 0."""
        every = self.config.train
        step, metrics = int(state.step), {}
        self.progress.start(step)
        if 0 < self.profiler.stop <= step + 1:
            self.progress.report("no trace: the steps of --profile were taken before")
        while step < every.steps:
            step += 1
            self.profiler.at(step, state)
            state, metrics = self.trainer.take_step(
                state, next(self.trainer.data.train)
            )
            last = step == every.steps
            scored = step % every.eval_every == 0 or last
            if step % every.log_every == 0 or scored:
                self._log(step, state, metrics, scored)
            stop = self._agreed(step, stopping)
            if step % every.save_every == 0 or last or stop:
                check_finite(state, metrics)
                self._save(step, state)
            self.progress.update(step)
            if stop and not last:
                self.progress.report(f"asked to stop: saved step {step}")
                return state, stop
        self.profiler.close()
        return state, 0

    def finish(self, state: State, finished: bool) -> dict[str, Any]:
        """Sum the run up; once it has come to its end, write everything down."""
        seconds = time.monotonic() - self.began
        if finished and not self.last_scores:  # all its steps were taken before
            self.last_scores, self.visits = self.trainer.evaluate(state)
        results = self.last_scores | {"finished": finished, "seconds": seconds}
        if not finished:
            return results
        trainer, last = self.trainer, self.config.train
        results |= costs(self.config, state)
        if self.config.mesh.context == 1:  # one new token at a time cannot be cut
            results["sample"] = sample_text(
                trainer.step.model(state),
                trainer.data.tokenizer,
                last.prompt,
                tokens=last.sample_tokens,
                seed=self.config.seed,
            )
        masks = None
        if self.config.masked is not None:
            masks = drawn(masks_of(state.opt))
        experts = None
        if self.visits is not None:
            tokenizer = trainer.data.tokenizer
            experts = self.routes.summed(self.visits, self.config.data, tokenizer)
        if self.process.index == 0:
            return finish(self.config, self.workdir, results, masks, experts)
        return results

    def close(self) -> None:
        """Let go of files and threads; errors of a pending save come out here."""
        self.profiler.close()
        self.trainer.data.train.close()
        self.progress.close()
        self.checkpoints.close()
        if hasattr(self, "log"):
            self.log.close()

    def _agreed(self, step: int, stopping: Callable[[], int]) -> int:
        """Give the signal that any process was asked to stop by, to all at one step."""
        if self.process.count == 1:
            return stopping()
        if step % self.config.train.log_every:
            return 0
        return max(said["stop"] for said in gather_json({"stop": stopping()}))

    def _log(self, step: int, state: State, metrics: dict, scored: bool) -> None:
        check_finite(state, metrics)
        data = self.config.data
        values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
        values["tokens"] = step * data.batch_size * data.seq_len
        if scored:
            self.last_scores, self.visits = self.trainer.evaluate(state)
            self.scored = step
            values |= self.last_scores
            if self.visits is not None:
                chosen = np.asarray(self.visits.chosen)
                values |= self.routes.add(step, chosen)
        values["seconds"] = time.monotonic() - self.began
        self.log.write(step, values)
        self.progress.show(values)

    def _save(self, step: int, state: State) -> None:
        positions = gather_json(self.trainer.data.train.state())
        self.checkpoints.save(
            step,
            state,
            data=merge_states(positions),
            config=to_dict(self.config),
            loss=self.last_scores["eval/loss"] if self.scored == step else None,
        )


def train(
    config: Config,
    workdir: str | Path,
    *,
    profile: str | None = None,
    process: Process | None = None,
) -> dict[str, Any]:
    """Train to the end, from wherever the workdir stands, and return the summary.

    A run that is asked to stop saves. By SIGTERM, it returns a summary with
    ``finished`` false.

    Raises:
        ConfigError: if this config cannot run on these devices, with this data, or in
            this workdir.
        KeyboardInterrupt: after a Ctrl-C.
        NonFiniteError: if the loss or a norm stopped being finite.
    """
    process = process or Process(jax.process_index(), jax.process_count())
    steps = config.train.steps
    profiler = Profiler(profile, Path(workdir) / "profile", steps=steps)
    mesh = make_mesh(config.mesh)
    home = open_workdir(
        workdir,
        to_dict(config),
        fingerprint(config),
        free=FREE,
        active=process.index == 0,
    )
    with (
        home,
        jax.set_mesh(mesh),
        disk_guard(home.path),
        _heard(signal.SIGTERM) as terminated,
    ):
        loop = _Loop(Trainer(config, mesh), home.path, process, profiler)
        try:
            state = loop.start()
            with _heard(signal.SIGINT) as interrupted:
                state, stop = loop.run(state, lambda: terminated() or interrupted())
            loop.checkpoints.wait()
            if stop == signal.SIGINT:
                raise KeyboardInterrupt
            return loop.finish(state, finished=not stop)
        finally:
            loop.close()


def with_steps(config: Config, steps: int) -> Config:
    """Shorten a config, for a test or a look."""
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=steps)
    )
