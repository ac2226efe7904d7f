"""Checkpoints: the whole state of a run on disk, whole or not at all.

A checkpoint is a folder named for its step, written by Orbax in the background and
renamed into place when complete. Beside the arrays it holds one JSON document, the
manifest: step, loss, config, the data's position, and shape, dtype and checksum of
every array, sealed by a hash of its own. ``restore`` believes nothing it has not
checked: a checkpoint with a changed bit, a short or a missing file is reported and the
next older one is taken. Arrays are named by their path, so a state comes back on any
mesh, in any tree with the same paths; shapes and dtypes are never adapted.
"""

import logging
import math
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sparsejax import tree
from sparsejax.config import ConfigError
from sparsejax.train.checksum import checksums
from sparsejax.train.distributed import barrier
from sparsejax.train.manifest import (
    ManifestError,
    check_same,
    describe,
    open_sealed,
    sealed,
)
from sparsejax.train.quiet import quieten_orbax
from sparsejax.typing import PyTree

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; one line, meant for the user."""


class _DamagedError(Exception):
    """This checkpoint is not what was saved; the message says how it shows."""


class Restored(NamedTuple):
    """What ``save`` was given, back from the disk and checked."""

    step: int
    state: PyTree  # the tree and the shardings that were asked for
    data: dict[str, Any]  # the data iterator's position
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Kept are the ``keep`` newest and the ``keep_best`` of lowest loss. Several processes
    share the folder, call the same methods in the same order and get the same answers.

    Args:
        directory: made if it does not exist; anything ``etils.epath`` can open.
        keep: how many of the newest stay; the very newest is never deleted.
        keep_best: how many of those with a loss stay besides, lowest loss first.
        report: called with one line for each checkpoint that is passed over.
        read_only: whether the folder is left as it is; ``save`` is then an error.

    Raises:
        CheckpointError: if the folder cannot be made or written to.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        keep_best: int = 0,
        report: Callable[[str], None] = _log.warning,
        read_only: bool = False,
    ) -> None:
        if keep < 1 or keep_best < 0:
            raise ConfigError(
                f"keep={keep}, keep_best={keep_best}: the newest checkpoint is always"
                " kept, so keep must be positive and keep_best not negative"
            )
        self.directory = epath.Path(directory).absolute()
        self.keep, self.keep_best, self.report = keep, keep_best, report
        self.read_only = read_only
        self._losses: dict[int, float] = {}
        self._whole: set[int] = set()  # saved or checked by this object
        self._damaged: set[int] = set()  # seen to be damaged; replaced by later saves
        self._pending: int | None = None
        quieten_orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        if jax.process_index() == 0 and not read_only:
            with _writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                probe = self.directory / ".writable"
                probe.write_text("")
                probe.unlink()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first, damaged or not."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if path.name.isdecimal()
            and path.is_dir()
            and ocp.utils.is_checkpoint_finalized(path)
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data: dict[str, Any],
        config: dict[str, Any],
        loss: float | None = None,
        blocking: bool = False,
    ) -> None:
        """Save a state in the background; its arrays may be donated straight after.

        The same step a second time is the same checkpoint, and not written again.

        Args:
            step: names the checkpoint.
            state: any tree of ``jax.Array``: parameters, masks, typed keys, counts.
            data: JSON-able position of the data of all processes.
            config: JSON-able; what the run is.
            loss: what ``keep_best`` compares; None or not finite: never among the best.
            blocking: whether to return only when the checkpoint is on disk.

        Raises:
            CheckpointError: if this save, or the one before it, could not be written,
                or a newer checkpoint is in the way.
            TypeError: for a leaf that is not an array.
        """
        self.wait()
        if step in self._whole:
            return
        self._make_way(step)
        known = loss is not None and math.isfinite(loss)
        document: dict[str, Any] = {"step": step, "loss": loss if known else None}
        document |= {"config": config, "data": data}
        items = _items(_arrays(state), document)
        with _writing(self._path(step)):
            self._orbax.save(self._path(step), args=items)
        self._pending = step
        self._losses[step] = loss if loss is not None and known else math.inf
        if blocking:
            self.wait()

    def restore(
        self,
        abstract: PyTree,
        *,
        step: int | None = None,
        only: Set[str] | None = None,
    ) -> Restored | None:
        """Give back the newest checkpoint that is whole; None if there is none at all.

        Args:
            abstract: a tree like the saved state, of ``jax.ShapeDtypeStruct`` with the
                shardings that are wanted (the first device where there is none).
            step: this checkpoint and no other.
            only: paths of the arrays to read, if not all; the others stay abstract.

        Raises:
            ConfigError: if the checkpoint is of another model: its arrays have other
                paths, shapes or dtypes.
            CheckpointError: if none of the checkpoints is whole.
        """
        self.wait()
        steps = self.steps() if step is None else [step]
        reasons = []
        for candidate in reversed(steps):
            restored, reason = self._checked(candidate, abstract, only)
            if restored is not None:
                self._whole.add(candidate)
                return restored
            reasons.append(f"{candidate}: {reason}")
            self._damaged.add(candidate)
            self._whole.discard(candidate)
            if candidate != steps[0]:
                self.report(
                    f"checkpoint {self._path(candidate)} is damaged ({reason}); taking"
                    " the next older one"
                )
        if reasons:
            raise CheckpointError(
                f"no whole checkpoint in {self.directory}: {'; '.join(reasons)};"
                " remove them to start anew"
            )
        return None

    def wait(self) -> None:
        """Wait for the pending save, then delete what is no longer kept.

        Raises:
            CheckpointError: if the pending save failed.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        with _writing(self._path(step)):
            self._orbax.wait_until_finished()
        self._whole.add(step)
        if jax.process_index() == 0:
            self._prune()

    def close(self) -> None:
        """Wait for the pending save and let go of threads.

        Raises:
            CheckpointError: if the pending save failed.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _make_way(self, step: int) -> None:
        """Remove half-written and damaged checkpoints; refuse to go behind a whole one.

        A run that fell back to an older checkpoint will pass the damaged ones again.
        """
        if self.read_only:
            raise CheckpointError(f"cannot save step {step}: opened as read_only")
        ahead = {s for s in self.steps() if s >= step}
        if ahead - self._damaged:
            raise CheckpointError(
                f"cannot save step {step}: {self._path(max(ahead - self._damaged))} is"
                " already there; resume from it, move it away, or use another workdir"
            )
        if jax.process_index() == 0:
            with _writing(self.directory):
                for path in self.directory.iterdir():
                    half = ocp.utils.is_tmp_checkpoint(path)
                    if half or path.name in map(str, ahead):
                        path.rmtree()
        self._damaged -= ahead
        barrier(f"make way for {step}")

    def _prune(self) -> None:
        steps = self.steps()
        for step in steps:
            if step not in self._losses:
                self._losses[step] = self._loss(step)
        finite = [s for s in steps if math.isfinite(self._losses[s])]
        # Of equal losses the later step is the better trained one.
        best = sorted(finite, key=lambda s: (self._losses[s], -s))[: self.keep_best]
        with _writing(self.directory):
            for step in set(steps) - set(steps[-self.keep :]) - set(best):
                self._path(step).rmtree()

    def _loss(self, step: int) -> float:
        try:
            loss = self._manifest(step)["loss"]
        except _DamagedError:
            return math.inf
        return math.inf if loss is None else loss

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            body = open_sealed((self._path(step) / "manifest" / "metadata").read_text())
        except OSError as error:
            raise _DamagedError(f"no manifest: {_line(error)}") from None
        except UnicodeDecodeError:
            raise _DamagedError("the manifest cannot be read") from None
        except ManifestError as error:
            raise _DamagedError(str(error)) from None
        if body["step"] != step:
            raise _DamagedError(f"the manifest is that of step {body['step']}")
        return body

    def _checked(self, step: int, *about: Any) -> tuple[Restored | None, str]:
        """Restore one checkpoint, or say what is wrong; all processes say the same."""
        restored, reason = None, ""
        try:
            restored = self._read(step, *about)
        except _DamagedError as error:
            reason = str(error)
        if not _all(restored is not None):
            return None, reason or "another process could not read it"
        return restored, ""

    def _read(self, step: int, abstract: PyTree, only: Set[str] | None) -> Restored:
        body = self._manifest(step)
        known = _arrays(abstract)
        check_same(self._path(step), body["arrays"], describe(known))
        wanted = {p: x for p, x in known.items() if only is None or p in only}
        targets = {path: _target(x) for path, x in wanted.items() if x.size}
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
        try:
            if len(wanted) < len(known):
                filled = _part(self._path(step) / "arrays", targets)
            else:
                filled = self._orbax.restore(self._path(step), args=items)["arrays"]
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
                raise
            raise _DamagedError(f"unreadable: {_line(error)}") from None
        arrays = {
            path: filled[path] if x.size else _empty(x) for path, x in wanted.items()
        }
        sums = checksums(arrays)
        wrong = [path for path in sums if sums[path] != body["checksums"][path]]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise _DamagedError(f"the numbers of {wrong[0]}{more} were changed")
        values = list((known | arrays).values())
        state = jax.tree.unflatten(jax.tree.structure(abstract), values)
        return Restored(step, state, body["data"], body["config"])


def _arrays(state: PyTree) -> dict[str, Any]:
    """All leaves by path, in the tree's order.

    Raises:
        ValueError: if two leaves have one path.
    """
    arrays = tree.leaves(state)
    paths = [tree.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    if len(paths) != len(arrays):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice!r} is the path of two arrays; rename one of them")
    return arrays


def _items(arrays: dict[str, Any], document: dict[str, Any]) -> ocp.args.Composite:
    """What Orbax is to write: the arrays, and the manifest that vouches for them."""
    body = document | {"arrays": describe(arrays), "checksums": checksums(arrays)}
    # Orbax refuses arrays without elements; the manifest says all about them.
    filled = {path: x for path, x in arrays.items() if x.size}
    return ocp.args.Composite(
        arrays=ocp.args.StandardSave(filled),
        manifest=ocp.args.JsonSave(sealed(body)),
    )


def _part(folder: epath.Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Read some of the arrays of a checkpoint."""
    how = ocp.checkpoint_utils.construct_restore_args(targets)
    some = ocp.args.PyTreeRestore(targets, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder, args=some)


def _target(x: Any) -> jax.ShapeDtypeStruct:
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _empty(x: Any) -> jax.Array:
    return jax.device_put(jax.numpy.empty(x.shape, x.dtype), _target(x).sharding)


def _line(error: BaseException) -> str:
    """Cut an error to one line that fits on a screen."""
    text = " ".join(str(error).split())
    if len(text) > 240:  # a storage library begins with what failed, and ends with why
        text = f"{text[:120]} ... {text[-120:]}"
    return f"{type(error).__name__}: {text}"


@contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    """Turn whatever goes wrong with a disk into one line with the path."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"cannot write {path}: {_line(error)}; check that the disk has room and may"
            " be written to"
        ) from error


def _all(holds: bool) -> bool:
    """Whether something holds on every process."""
    if jax.process_count() == 1:
        return holds
    # Of NumPy: under a mesh an array of JAX would belong to all processes at once.
    return bool(multihost_utils.process_allgather(np.array(holds)).all())
