"""Routers that look at all tokens at once, so that every expert gets its share.

An assignment made in training knows the tokens that follow; what is computed from it
at evaluation does not, but for ``expert_choice``, which a causal model refuses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.moe.routers.routing import (
    Routing,
    check_count,
    choose,
    everywhere,
    pick,
)
from sparsejax.ranking import best
from sparsejax.typing import Array, Bool, Float, Int, PRNGKeyArray

__all__ = [
    "auction",
    "base",
    "expert_choice",
    "expert_choice_by_position",
    "s_base",
    "selective_sinkhorn",
    "sinkhorn",
]


def _check_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name}={value}: must be positive")


def sinkhorn(
    scores: Float[Array, "n e"],
    *,
    valid: Bool[Array, " n"] | None = None,
    temperature: float = 1.0,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Float[Array, "n e"]:
    """Give the plan of most score and entropy with rows of 1 and equal columns.

    Alternating projections in the log domain, until every column is within
    ``tolerance`` of its share, relative to it. Rows that are not valid are 0.

    Raises:
        ValueError: if the temperature is not positive.

    Source: Cuturi 2013, arXiv:1306.0895, Alg. 1.
    """
    _check_positive("temperature", temperature)
    live = jnp.ones(scores.shape[0], bool) if valid is None else valid
    share = jnp.maximum(live.sum(), 1).astype(jnp.float32) / scores.shape[1]
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32)) / temperature
    scores = jnp.where(live[:, None], scores, -jnp.inf)

    def plan(columns: Array) -> Array:
        return jnp.where(live[:, None], jax.nn.softmax(scores + columns[None]), 0)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        columns, _, count = state
        given = plan(columns).sum(axis=0)
        off = jnp.abs(given / share - 1).max()
        # A column that underflowed to nothing is raised as far as numbers go.
        columns = columns + jnp.log(share) - jnp.log(jnp.maximum(given, 1e-37))
        return columns, off, count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > tolerance) & (state[2] < iterations)

    start = jnp.zeros(scores.shape[1]), jnp.asarray(jnp.inf), jnp.zeros((), jnp.int32)
    return plan(jax.lax.while_loop(unfinished, step, start)[0])


def s_base(
    logits: Float[Array, "n e"],
    *,
    k: int,
    valid: Bool[Array, " n"] | None = None,
    key: PRNGKeyArray | None = None,
    temperature: float = 1.0,
    iterations: int = 100,
) -> Routing:
    """Choose by a balanced transport plan in training, by the logits otherwise.

    Weights are the softmax of the logits, whichever chose.

    Source: Clark et al. 2022, arXiv:2202.01169, App. B.
    """
    logits = logits.astype(jnp.float32)
    probs, scores = jax.nn.softmax(logits), logits
    if key is not None:
        scores = sinkhorn(
            logits, valid=valid, temperature=temperature, iterations=iterations
        )
    chosen = choose(scores, k)
    return Routing(chosen, pick(probs, chosen), probs, {})


def selective_sinkhorn(
    logits: Float[Array, "n e"],
    *,
    k: int,
    valid: Bool[Array, " n"] | None = None,
    key: PRNGKeyArray | None = None,
    probability: float = 0.005,
    temperature: float = 0.1,
    iterations: int = 100,
) -> Routing:
    """Take choice and weights from a transport plan in few steps, else from a softmax.

    In those steps the router gets no gradient; in the others logits are noisy while
    training. There is no balancing loss.

    Args:
        probability: of a step with a plan.
        temperature: weight of the plan's entropy.

    Source: Nguyen et al. 2025, arXiv:2511.08972, abstract. Departure: noise of
    deviation 1/experts.
    """
    logits = logits.astype(jnp.float32)
    check_count(k, logits.shape[1])
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability}: must be between 0 and 1")

    def by_plan(logits: Array) -> tuple[Array, Array]:
        plan = sinkhorn(
            logits, valid=valid, temperature=temperature, iterations=iterations
        )
        chosen = choose(plan, k)
        kept = jax.lax.stop_gradient(pick(plan, chosen))
        return chosen, kept / jnp.maximum(kept.sum(axis=1, keepdims=True), 1e-30)

    def by_softmax(logits: Array) -> tuple[Array, Array]:
        chosen = choose(logits, k)
        return chosen, jax.nn.softmax(pick(logits, chosen))

    if key is None:
        chosen, weights = by_softmax(logits)
    else:
        draw, noise = jax.random.split(key)
        noisy = jax.random.normal(noise, logits.shape) / logits.shape[1] + logits
        chosen, weights = jax.lax.cond(
            jax.random.bernoulli(draw, probability),
            lambda: by_plan(logits),
            lambda: by_softmax(noisy),
        )
    return Routing(chosen, weights, jax.nn.softmax(logits), {})


class _Auction(NamedTuple):
    """Who holds which expert, for what bid, and what entry costs."""

    owner: Int[Array, " n"]  # expert of each token, or -1
    bids: Float[Array, " n"]
    prices: Float[Array, " e"]


def _above_lowest(
    scores: Float[Array, "n e"], live: Bool[Array, " n"]
) -> Float[Array, "n e"]:
    known = live[:, None] & jnp.isfinite(scores)
    lowest = jnp.where(known, scores, jnp.inf).min()
    return jnp.where(known, scores - lowest, 0)


def auction(
    scores: Float[Array, "n e"],
    *,
    valid: Bool[Array, " n"] | None = None,
    precision: float = 0.02,
) -> Int[Array, " n"]:
    """Assign each token one expert, none more than its share, for nearly most score.

    Tokens without an expert bid for their best one what they would lose by taking the
    second; an expert keeps its highest bidders. The total is within ``precision``
    times the range of the scores, per token, of the best. An expert's share is the
    valid tokens over the experts, up; tokens that are not valid get expert 0. What is
    not finite counts as the lowest score.

    Raises:
        ValueError: if the precision is not positive: bids would not rise.

    Source: Lewis et al. 2021, arXiv:2103.16716, Sec. 3.1.
    """
    _check_positive("precision", precision)
    tokens, experts = scores.shape
    live = jnp.ones(tokens, bool) if valid is None else valid
    scores = _above_lowest(jax.lax.stop_gradient(scores.astype(jnp.float32)), live)
    room = -(-live.sum() // experts)
    step_up = precision * scores.max() + 1e-6 * jnp.maximum(scores.max(), 1e-6)
    ids = jnp.arange(experts, dtype=jnp.int32)

    def step(state: _Auction) -> _Auction:
        free = live & (state.owner < 0)
        value = scores - state.prices[None]
        wish = best(value, min(2, experts))
        gain = pick(value, wish)
        first = wish[:, 0]
        offer = state.prices[first] + gain[:, 0] - gain[:, -1] + step_up
        owner = jnp.where(free, first, state.owner)
        bids = jnp.where(free, offer, state.bids)
        holds = owner[:, None] == ids[None]
        table = jnp.where(holds, bids[:, None], -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-table, axis=0, stable=True), axis=0)
        kept = holds & (rank < room)
        full = kept.sum(axis=0) == room
        lowest = jnp.where(kept, table, jnp.inf).min(axis=0)
        prices = jnp.where(full, lowest, state.prices)
        return _Auction(jnp.where(kept.any(axis=1), owner, -1), bids, prices)

    nobody = jnp.full(tokens, -1, jnp.int32)
    start = _Auction(nobody, jnp.zeros(tokens), jnp.zeros(experts))
    end = jax.lax.while_loop(lambda s: (live & (s.owner < 0)).any(), step, start)
    return jnp.maximum(end.owner, 0)


def base(
    logits: Float[Array, "n e"],
    *,
    k: int = 1,
    valid: Bool[Array, " n"] | None = None,
    key: PRNGKeyArray | None = None,
    precision: float = 0.02,
) -> Routing:
    """Give every expert the same number of tokens in training; be greedy otherwise.

    The weight is the sigmoid of the chosen logit; the assignment has no gradient.

    Raises:
        ValueError: if ``k`` is not 1.

    Source: Lewis et al. 2021, arXiv:2103.16716, Sec. 3. Departure: all tokens of the
    batch are assigned at once, not those of a worker.
    """
    if k != 1:
        raise ValueError(f"k={k}: base assigns one expert; s_base visits more")
    logits = logits.astype(jnp.float32)
    chosen = choose(logits, 1)
    if key is not None:
        chosen = auction(logits, valid=valid, precision=precision)[:, None]
    weights = jax.nn.sigmoid(pick(logits, chosen))
    return Routing(chosen, weights, jax.nn.softmax(logits), {})


def expert_choice(
    logits: Float[Array, "n e"], *, k: int, valid: Bool[Array, " n"] | None = None
) -> Routing:
    """Let every expert take its best tokens, ``k`` times the tokens over the experts.

    A token is taken by any number of experts. Which ones depends on all tokens, later
    ones too.

    Source: Zhou et al. 2022, arXiv:2202.09368, Sec. 3.2.
    """
    check_count(k, logits.shape[1])
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    live = jnp.ones(probs.shape[0], bool) if valid is None else valid
    taken = _taken(probs[None], live[None], k)[0]
    weights = jnp.where(taken, probs, 0)
    return Routing(everywhere(weights), weights, probs, {})


def expert_choice_by_position(
    logits: Float[Array, "n e"],
    *,
    k: int,
    batch: int | None = None,
    valid: Bool[Array, " n"] | None = None,
) -> Routing:
    """Let every expert take its best among the tokens at the same place of each row.

    No token sees a later one of its own sequence; the sequences of a batch compete. One
    by itself has nobody to compete with: each of its tokens visits all experts.

    Args:
        batch: sequences that the tokens are of; one if not given.

    Source: Zhou et al. 2022, arXiv:2202.09368, Sec. 3.2. Departure: tokens compete
    within a position.
    """
    check_count(k, logits.shape[1])
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    live = jnp.ones(probs.shape[0], bool) if valid is None else valid

    def groups(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(batch or 1, -1, *x.shape[1:]), 0, 1)

    taken = _taken(groups(probs), groups(live), k)
    taken = jnp.swapaxes(taken, 0, 1).reshape(probs.shape)
    weights = jnp.where(taken, probs, 0)
    return Routing(everywhere(weights), weights, probs, {})


def _taken(
    probs: Float[Array, "t n e"], live: Bool[Array, "t n"], k: int
) -> Bool[Array, "t n e"]:
    """Say which tokens of each group an expert takes; ties go to the earlier token."""
    count = -(-live.sum(axis=1, dtype=jnp.int32) * k // probs.shape[2])[:, None, None]
    scores = jax.lax.stop_gradient(jnp.where(live[..., None], probs, -jnp.inf))
    order = jnp.argsort(-scores, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return (rank < count) & live[..., None]
