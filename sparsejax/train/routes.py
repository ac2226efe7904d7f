"""Where tokens go: the experts of some held-out tokens, kept, compared and summed up.

At each evaluation a run keeps the experts of the same few thousand tokens in
``routes/STEP.npy``, so that a resumed run compares with what an uninterrupted one would
have compared with, and a finished one can look back. All processes call the same
functions on the same arrays; one writes.
"""

import io
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.data import Batch, DataConfig
from sparsejax.moe import MoEConfig, measures
from sparsejax.nn import ModelConfig
from sparsejax.partition import replicated
from sparsejax.train.workdir import write_atomically
from sparsejax.typing import Array, Int

__all__ = ["Routes", "Visits", "no_visits", "pictures", "unvisited", "visits_of"]

TOKENS = 4096  # that are looked at; of more, every second, third, …
IDS = 16  # the commonest ones, that pictures show
LOAD = "moe/load"

Chosen = np.ndarray  # int16 "l m k", -1 for a slot that is not used


class Visits(NamedTuple):
    """The experts of some tokens, and what the tokens are."""

    chosen: Int[Array, "l m k"]  # of each layer that has experts; -1: no visit
    tokens: Int[Array, " m"]
    positions: Int[Array, " m"]


def visits_of(metrics: dict[str, Array], batch: Batch) -> Visits | None:
    """Find in a model's metrics where a batch's tokens go; None without experts."""
    if "moe/evidence/experts" not in metrics:
        return None
    experts, weights = (metrics[f"moe/evidence/{x}"] for x in ("experts", "weights"))
    tokens, segments, positions = (jnp.asarray(x)[:, :-1].reshape(-1) for x in batch)
    used = (weights != 0) & (segments > 0)[None, :, None]
    chosen = jnp.where(used, experts, -1).astype(jnp.int16)
    stride = math.ceil(tokens.size / TOKENS)
    return Visits(chosen[:, ::stride], tokens[::stride], positions[::stride])


def no_visits(config: ModelConfig) -> dict[str, Array]:
    """Begin to count the visits of each expert; nothing without experts."""
    layers = [config.layer(n).feed_forward == config.ffn for n in range(config.depth)]
    if not isinstance(config.ffn, MoEConfig) or not any(layers):
        return {}
    return {LOAD: jnp.zeros((sum(layers), config.ffn.experts))}


def unvisited(since: dict[str, Array]) -> dict[str, Array]:
    """Give the share of each layer's experts that no token has visited since."""
    if LOAD not in since:
        return {}
    return {"moe/unvisited": measures.dead_experts(since[LOAD][:, None], window=1)}


class Routes:
    """The visits of the same tokens at each evaluation of a run.

    Args:
        folder: where they are kept.
        experts: of a layer.
        step: where the run goes on; what is later is forgotten. None: at its beginning.
        active: whether this process writes.
    """

    def __init__(
        self, folder: Path, *, experts: int, step: int | None, active: bool
    ) -> None:
        self.folder, self.experts, self.active = folder, experts, active
        found = {int(path.stem): path for path in folder.glob("[0-9]*.npy")}
        known = -1 if step is None else step
        for late in (path for at, path in found.items() if at > known and active):
            late.unlink(missing_ok=True)
        kept = sorted((at, path) for at, path in found.items() if at <= known)
        self.kept: dict[int, Chosen] = {at: np.load(path) for at, path in kept}
        compare = replicated(jax.vmap(partial(_compared, experts=experts)))
        self._compare = lambda *chosen: jax.tree.map(np.asarray, compare(*chosen))

    def add(self, step: int, chosen: Chosen) -> dict[str, np.ndarray]:
        """Keep an evaluation's visits; compare with those of the one before, if any.

        Returns:
            ``moe/churn``, the share of each layer's tokens that go elsewhere, and
            ``moe/saturation``, the share of visits that were paid then already.
        """
        before = [self.kept[at] for at in self.kept if at < step]
        self.kept[step] = chosen
        if self.active:
            self.folder.mkdir(exist_ok=True)
            content = io.BytesIO()
            np.save(content, chosen)
            write_atomically(self.folder / f"{step:08d}.npy", content.getvalue())
        if not before:
            return {}
        return self._compare(before[-1], chosen)

    def summed(
        self, visits: Visits, data: DataConfig, tokenizer: Any
    ) -> dict[str, Any]:
        """Look back at a finished run: ``pictures``, with names of their rows.

        Also ``saturation``: by step, the share of each layer's last visits that it paid
        then already.
        """
        found: dict[str, Any] = pictures(visits, self.experts, data.seq_len)
        ids, places = found.pop("ids").tolist(), found["by_position"].shape[1]
        last = [*self.kept.values()][-1:]
        then = {at: self._compare(x, *last) for at, x in self.kept.items()}
        return found | {
            "tokens": [repr(tokenizer.decode([n])) for n in ids],
            "positions": ["0", "1", *(f"from {2**n}" for n in range(1, places - 1))],
            "saturation": {at: x["moe/saturation"] for at, x in then.items()},
        }


def pictures(visits: Visits, experts: int, length: int) -> dict[str, np.ndarray]:
    """Sum up what the experts of each layer are for, as ``moe.measures`` does.

    Args:
        visits: the tokens and their experts.
        experts: of a layer.
        length: of a sequence.

    Returns:
        ``co_activation`` "l e e", ``by_token`` "l v e" with the commonest ``ids`` " v",
        and ``by_position`` "l p e" by the number of a position's binary digits.
    """
    tokens = np.asarray(visits.tokens)
    live = (np.asarray(visits.chosen) >= 0).any(axis=(0, 2))
    ids, counts = np.unique(tokens[live], return_counts=True)
    ids = ids[np.argsort(-counts, kind="stable")][:IDS]
    same = tokens[:, None] == ids[None]
    label = np.where(same.any(axis=1), same.argmax(axis=1), len(ids)).astype(np.int32)
    digits = max(length - 1, 1).bit_length() + 1

    def told(chosen: Array, label: Array, positions: Array) -> dict[str, Array]:
        slots = _slots(chosen)
        count = partial(measures.joint_counts, *slots, count=experts)
        places = measures.position_bucket(positions, groups=digits)
        by_token = measures.specialisation(count(label, groups=len(ids) + 1))
        return {
            "co_activation": measures.co_activation(*slots, count=experts),
            "by_token": by_token[:-1],
            "by_position": measures.specialisation(count(places, groups=digits)),
        }

    layers = jax.vmap(told, in_axes=(0, None, None))
    found = replicated(layers)(visits.chosen, label, visits.positions)
    return jax.tree.map(np.asarray, found) | {"ids": ids}


def _compared(before: Array, after: Array, *, experts: int) -> dict[str, Array]:
    pair = _slots(before), _slots(after)
    return {
        "moe/churn": measures.churn(*pair, experts=experts),
        "moe/saturation": measures.saturation(*pair, experts=experts),
    }


def _slots(chosen: Array) -> tuple[Array, Array]:
    """Give experts and weights as a layer does; a slot that is not used weighs 0."""
    return chosen, (chosen >= 0).astype(jnp.float32)
