"""Tables: the expert of each id of a vocabulary, computed once, before training.

``TABLES`` are NumPy functions of what they need, counts or embeddings by id, that give
an int32 array. ``python -m sparsejax.convert table`` makes one from a trained run and
writes it where a config's ``table`` finds it.
"""

import heapq
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sparsejax.config import FieldError

__all__ = ["TABLES", "balanced", "clustered", "dispersed", "random", "read_table"]


def random(vocabulary: int, experts: int, *, seed: int = 42) -> np.ndarray:
    """Draw every id's expert.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    drawn = np.random.default_rng(seed).integers(0, experts, vocabulary)
    return drawn.astype(np.int32)


def balanced(counts: np.ndarray, experts: int) -> np.ndarray:
    """Give ids, the most frequent first, to the expert with the least so far.

    No expert's load exceeds the mean by more than the count of one id.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    table = np.zeros(len(counts), np.int32)
    heap = [(0, expert) for expert in range(experts)]
    for token in np.argsort(-np.asarray(counts), kind="stable"):
        load, expert = heapq.heappop(heap)
        table[token] = expert
        heapq.heappush(heap, (load + int(counts[token]), expert))
    return table


def clustered(
    embeddings: np.ndarray, experts: int, *, seed: int = 42, rounds: int = 25
) -> np.ndarray:
    """Give ids with similar embeddings one expert, by k-means; a poor hash, they say.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    points = np.asarray(embeddings, np.float64)
    if len(points) < experts:
        raise ValueError(
            f"{len(points)} embeddings: must be at least as many as experts={experts}"
        )
    generator = np.random.default_rng(seed)
    centers = points[generator.choice(len(points), experts, replace=False)]
    table = np.zeros(len(points), np.int32)
    for _ in range(rounds):
        distance = (centers**2).sum(axis=1) - 2 * points @ centers.T
        table = distance.argmin(axis=1).astype(np.int32)
        for expert in range(experts):
            members = points[table == expert]
            if len(members):
                centers[expert] = members.mean(axis=0)
    return table


def dispersed(
    embeddings: np.ndarray, experts: int, *, seed: int = 42, rounds: int = 25
) -> np.ndarray:
    """Spread the members of each cluster over all experts, in turn.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    clusters = clustered(embeddings, experts, seed=seed, rounds=rounds)
    table = np.zeros_like(clusters)
    table[np.argsort(clusters, kind="stable")] = np.arange(len(clusters)) % experts
    return table


TABLES: dict[str, Callable[..., np.ndarray]] = {
    "random": random,
    "balanced": balanced,
    "clustered": clustered,
    "dispersed": dispersed,
}


def read_table(path: str, experts: int) -> np.ndarray:
    """Read a table from its file.

    Raises:
        FieldError: if it is not there, or not a list of experts.
    """
    if not Path(path).is_file():
        raise FieldError(
            f"table={path!r}: no such file; write it with python -m sparsejax.convert"
            " table"
        )
    table = np.load(path)
    legal = table.ndim == 1 and np.issubdtype(table.dtype, np.integer)
    if not legal or table.size == 0 or table.min() < 0 or table.max() >= experts:
        raise FieldError(
            f"table={path!r}: must be a list of integers from 0 to {experts - 1}, an"
            " expert for each id; write it again for this number of experts"
        )
    return table.astype(np.int32)
