"""Drops: small buffers lose what a plain simulation loses, and say where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.moe import PRIORITIES, drop_shares
from sparsejax.moe.capacity import Cause, rows_of
from sparsejax.moe.ragged import grants
from tests.moe.exchange_programs import (
    EXPERTS,
    MESHES,
    TOKENS,
    K,
    assert_close,
    oracle,
    problem,
    program,
    routed,
)

DEVICES, GROUPS = 4, 2
TIGHT = {
    "all_to_all": {"exchange_factor": 1.25, "capacity_factor": 1.0},
    "ragged_all_to_all": {"exchange_factor": 1.25},
}


@functools.cache
def crowded():
    """A routing that wants expert 5 too often, with a few slots unused."""
    _, logits, _ = problem()
    routing = routed("top_k_softmax")
    wants = (jnp.arange(TOKENS) % 3 == 0)[:, None]
    chosen = jnp.where(wants, jnp.asarray([[5, 4]]), routing.experts)
    weights = routing.weights + 0.1 * jax.nn.sigmoid(logits[:, :K])
    return routing._replace(
        experts=chosen.astype(jnp.int32), weights=weights.at[::7, 1].set(0)
    )


def served(weights, priority):
    """Slots of one device, the first to be served first."""
    tokens = range(weights.shape[0])
    if priority == "token":
        return [(n, k) for n in tokens for k in range(K) if weights[n, k]]
    if priority == "score":
        tokens = sorted(tokens, key=lambda n: -weights[n].max())
    return [(n, k) for k in range(K) for n in tokens if weights[n, k]]


def simulated_all_to_all(chosen, weights, *, priority, rows, capacity):
    """Fill every buffer one slot at a time; then let senders take turns."""
    causes = np.zeros(chosen.shape, int)
    inbox = [[[] for _ in range(DEVICES)] for _ in range(DEVICES)]
    for d in range(DEVICES):
        for n, k in served(weights[d], priority):
            box = inbox[chosen[d, n, k] // (EXPERTS // DEVICES)][d]
            if len(box) < rows:
                box.append((d, n, k))
            else:
                causes[d, n, k] = Cause.SENDER
    left = [capacity] * EXPERTS
    for boxes in inbox:
        for place in range(rows):
            for slot in (box[place] for box in boxes if place < len(box)):
                left[chosen[slot]] -= 1
                if left[chosen[slot]] < 0:
                    causes[slot] = Cause.RECEIVER
    return causes


def simulated_ragged(chosen, weights, *, priority, rows):
    """Every sender has its share of a receiver; then the first take what is left."""
    causes = np.zeros(chosen.shape, int)
    for target in range(DEVICES):
        queues = [
            [
                (d, n, k)
                for n, k in served(weights[d], priority)
                if chosen[d, n, k] // (EXPERTS // DEVICES) == target
            ]
            for d in range(DEVICES)
        ]
        share = rows // DEVICES
        free = rows - sum(min(len(q), share) for q in queues)
        for queue in queues:
            extra = min(free, max(len(queue) - share, 0))
            free -= extra
            for slot in queue[share + extra :]:
                causes[slot] = Cause.RECEIVER
    return causes


def expected(exchange, routing, priority):
    local = TOKENS // DEVICES // GROUPS
    shape = (GROUPS, DEVICES, local, K)
    chosen, weights = (np.asarray(a).reshape(shape) for a in routing[:2])
    slots = local * K
    if exchange == "all_to_all":
        limits = {
            "rows": rows_of(slots=slots, targets=DEVICES, factor=1.25),
            "capacity": rows_of(slots=slots * DEVICES, targets=EXPERTS, factor=1.0),
        }
        simulate = functools.partial(simulated_all_to_all, **limits)
    else:
        rows = rows_of(slots=slots * DEVICES, targets=DEVICES, factor=1.25)
        simulate = functools.partial(simulated_ragged, rows=rows)
    groups = zip(chosen, weights, strict=True)
    causes = [simulate(c, w, priority=priority) for c, w in groups]
    return np.stack(causes).reshape(TOKENS, K)


@pytest.mark.parametrize("priority", sorted(PRIORITIES))
@pytest.mark.parametrize("exchange", sorted(TIGHT))
def test_small_buffers_lose_what_the_simulation_loses(exchange, priority):
    """Causes exactly; values and gradients are those of the visits that are left."""
    x, _, experts = problem()
    routing = crowded()
    settings = TIGHT[exchange] | {"capacity_priority": priority}
    run = program(exchange, MESHES[DEVICES], **settings)
    values, grads, causes = run(x, routing, experts)
    lost = expected(exchange, routing, priority)
    np.testing.assert_array_equal(causes, lost)
    assert {0, *([2, 3] if exchange == "all_to_all" else [3])} == set(lost.flat)
    left = routing._replace(weights=jnp.where(lost == 0, routing.weights, 0))
    plain_values, plain_grads, _ = oracle(x, left, experts)
    assert_close(values, plain_values)
    assert_close((grads[0], grads[2]), (plain_grads[0], plain_grads[2]))
    used = np.asarray(left.weights != 0)
    assert_close(grads[1][used], plain_grads[1][used])
    assert not grads[1][~used].any()


def test_an_experts_capacity_counts_the_whole_batch_on_any_mesh():
    """It drops what one device drops, before anything is sent."""
    x, _, experts = problem()
    alone, apart = (
        program(name, MESHES[devices], capacity_factor=1.0)(x, crowded(), experts)
        for name, devices in (("ring", 1), ("ragged_all_to_all", 4))
    )
    assert set(alone[2].flat) == {Cause.NONE, Cause.CAPACITY}
    assert_close(apart, alone)


def test_shares_of_drops_are_split_by_cause_and_leave_out_padding():
    routing = crowded()
    causes = expected("all_to_all", routing, "position")
    valid = np.arange(TOKENS) < TOKENS // 2
    shares = drop_shares(routing, jnp.asarray(causes), valid=jnp.asarray(valid))
    asked = (np.asarray(routing.weights) != 0) & valid[:, None]
    for cause in (Cause.CAPACITY, Cause.SENDER, Cause.RECEIVER):
        share = (causes[asked] == cause).sum() / asked.sum()
        np.testing.assert_allclose(shares[f"dropped_{cause.name.lower()}"], share)


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_grants_fill_a_receiver_and_never_overfill_it(rows):
    wanted = np.asarray([[4, 0, 9], [1, 0, 9], [6, 2, 0]])
    given = np.asarray(grants(jnp.asarray(wanted), rows))
    np.testing.assert_array_equal(
        given.sum(axis=0), np.minimum(rows, wanted.sum(axis=0))
    )
    assert (given <= wanted).all()
    assert (given >= np.minimum(wanted, rows // 3)).all()
