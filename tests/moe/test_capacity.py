"""Capacity: roundings and priorities by name, against one visit at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.moe import PRIORITIES, Routing, capacity_of, limited
from sparsejax.moe.capacity import rows_of

TOKENS, EXPERTS, K = 40, 6, 2


def crowded():
    """All want expert 0 first; second choices go round; a few slots are unused."""
    second = 1 + jnp.arange(TOKENS) % (EXPERTS - 1)
    chosen = jnp.stack([jnp.zeros_like(second), second], axis=1).astype(jnp.int32)
    weights = 0.5 + jax.random.uniform(jax.random.key(0), chosen.shape)
    weights = weights.at[::7, 0].set(0)
    return Routing(chosen, weights, jnp.full((TOKENS, EXPERTS), 1 / EXPERTS), {})


def kept_one_by_one(routing, capacity, slots):
    left, kept = [capacity] * EXPERTS, np.zeros((TOKENS, K), bool)
    for n, k in slots:
        if routing.weights[n, k]:
            e = int(routing.experts[n, k])
            kept[n, k], left[e] = left[e] > 0, left[e] - 1
    return kept


@pytest.mark.parametrize("capacity", [1, 7, TOKENS])
@pytest.mark.parametrize("priority", sorted(PRIORITIES))
def test_a_limit_serves_visits_in_the_order_of_its_priority(priority, capacity):
    routing = crowded()
    score = np.asarray(routing.weights).max(axis=1)
    surest = np.argsort(-score, kind="stable")
    order = {
        "position": [(n, k) for k in range(K) for n in range(TOKENS)],
        "score": [(n, k) for k in range(K) for n in surest],
        "token": [(n, k) for n in range(TOKENS) for k in range(K)],
    }
    kept = limited(routing, capacity, priority=priority).weights != 0
    expected = kept_one_by_one(routing, capacity, order[priority])
    np.testing.assert_array_equal(kept, expected)


def test_by_token_what_comes_later_changes_nothing():
    routing = crowded()
    changed = routing._replace(experts=routing.experts.at[TOKENS // 2 :].set(2))
    both = [limited(r, 12, priority="token").weights for r in (routing, changed)]
    np.testing.assert_array_equal(*(w[: TOKENS // 2] for w in both))
    assert (both[0] != both[1]).any()


def test_by_score_the_surest_tokens_stay_whatever_their_place():
    routing = crowded()
    backwards = jax.tree.map(lambda a: a[::-1], routing)
    kept, mirrored = (
        limited(r, 5, priority="score").weights[:, 0] for r in (routing, backwards)
    )
    np.testing.assert_array_equal(kept, mirrored[::-1])
    assert (kept != 0).sum() == 5
    dropped = (kept == 0) & (routing.weights[:, 0] != 0)
    score = routing.weights.max(axis=1)
    assert score[kept != 0].min() > score[dropped].max()


@pytest.mark.parametrize(
    ("rounding", "expected"), [("up", 7), ("down", 6), ("nearest", 7)]
)
def test_a_half_is_rounded_by_name(rounding, expected):
    sizes = {"tokens": 26, "experts": 8, "per_token": 2}
    assert capacity_of(**sizes, factor=1.0, rounding=rounding) == expected


def test_rows_are_at_least_one_and_at_most_all():
    assert rows_of(slots=12, targets=4, factor=1e-6, rounding="down") == 1
    assert rows_of(slots=12, targets=4, factor=9.0) == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: limited(crowded(), 3, priority="scor"), "priority='scor'.*'score'"),
        (lambda: rows_of(slots=8, targets=2, factor=1.0, rounding="u"), "rounding='u'"),
        (lambda: rows_of(slots=8, targets=2, factor=-1.0), "factor=-1.0: a capacity"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
