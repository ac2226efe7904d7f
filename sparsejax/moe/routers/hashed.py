"""Routers without parameters: the id decides, or its place, or the id before it.

All visit one expert with weight 1, but for ``multi_hash``, which visits ``k``. They
take the number of experts from the shape of their scores and look at nothing else of
them. A ``seed`` draws another hash. Whatever can be precomputed for each id, balanced
or clustered assignments, the features of a word, is a table: see ``TABLES``.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.moe.routers.routing import Routing
from sparsejax.typing import Array, Float, Int

__all__ = [
    "hash_bigram",
    "hash_position",
    "hash_previous",
    "hash_random",
    "hash_table",
    "multi_hash",
]


def mixed(ids: Array, seed: int) -> Array:
    """Mix the bits of each id; every bit of the result depends on every bit of it."""
    start = np.uint32((seed * 0x9E3779B9 + 1) % 2**32)
    x = ids.astype(jnp.uint32) + start
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(15))


def hash_random(
    blank: Float[Array, "n e"],
    *,
    k: int = 1,
    tokens: Int[Array, " n"] | None = None,
    seed: int = 42,
) -> Routing:
    """Visit the expert that the token's id hashes to.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1. Departure: a mixing function
    takes the place of a random table, so that any vocabulary has one.
    """
    ids = _given("tokens", tokens)
    return _one(_bucket(mixed(ids, seed), blank.shape[1]), blank, k)


def hash_bigram(
    blank: Float[Array, "n e"],
    *,
    k: int = 1,
    tokens: Int[Array, " n"] | None = None,
    previous: Int[Array, " n"] | None = None,
    seed: int = 42,
) -> Routing:
    """Visit the expert that the token and the one before it hash to, in this order.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    last = mixed(_given("previous", previous), seed)
    now = mixed(_given("tokens", tokens), seed + 1)
    both = mixed(last + np.uint32(3) * now, seed)
    return _one(_bucket(both, blank.shape[1]), blank, k)


def hash_previous(
    blank: Float[Array, "n e"],
    *,
    k: int = 1,
    previous: Int[Array, " n"] | None = None,
    seed: int = 42,
) -> Routing:
    """Visit the expert that the token before hashes to.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    return hash_random(blank, k=k, tokens=_given("previous", previous), seed=seed)


def hash_position(
    blank: Float[Array, "n e"],
    *,
    k: int = 1,
    positions: Int[Array, " n"] | None = None,
    seed: int = 42,
) -> Routing:
    """Visit the expert that the place in the document hashes to.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    return hash_random(blank, k=k, tokens=_given("positions", positions), seed=seed)


def hash_table(
    blank: Float[Array, "n e"],
    *,
    k: int = 1,
    tokens: Int[Array, " n"] | None = None,
    table: Int[Array, " v"] | None = None,
) -> Routing:
    """Visit the expert that a table has for the token's id.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.1.
    """
    ids, table = _given("tokens", tokens), _given("table", table)
    return _one(table[ids].astype(jnp.int32), blank, k)


def multi_hash(
    blank: Float[Array, "n e"],
    *,
    k: int,
    tokens: Int[Array, " n"] | None = None,
    seed: int = 42,
) -> Routing:
    """Let ``k`` hashes each choose one expert of its own ``experts / k``.

    Raises:
        ValueError: if ``k`` does not divide the experts.

    Source: Roller et al. 2021, arXiv:2106.04426, Sec. 3.2. Departure: each segment is
    an expert that writes the full width, and the segments are added.
    """
    experts = blank.shape[1]
    if k < 1 or experts % k:
        raise ValueError(
            f"k={k}: must be at least 1 and divide the {experts} experts, so that each"
            " hash has its own"
        )
    part = jnp.arange(k, dtype=jnp.int32)
    ids = _given("tokens", tokens)
    hashes = jnp.stack([mixed(ids, seed + 7 * n) for n in range(k)], axis=1)
    chosen = _bucket(hashes, experts // k) + part[None] * (experts // k)
    probs = jax.nn.one_hot(chosen, experts).mean(axis=1)
    return Routing(chosen, jnp.ones(chosen.shape), probs, {})


def _bucket(hashes: Array, experts: int) -> Array:
    return (hashes % np.uint32(experts)).astype(jnp.int32)


def _one(chosen: Int[Array, " n"], blank: Float[Array, "n e"], k: int) -> Routing:
    if k != 1:
        raise ValueError(f"k={k}: a hash visits one expert; multi_hash visits more")
    probs = jax.nn.one_hot(chosen, blank.shape[1])
    return Routing(chosen[:, None], jnp.ones((chosen.shape[0], 1)), probs, {})


def _given(name: str, value: Array | None) -> Array:
    if value is None:
        raise ValueError(
            f"{name}=None: this router hashes them; pass {name}= to the layer, or"
            " choose a router that reads hidden states"
        )
    return value
