"""Assignments that balance, gates that steer themselves, means that follow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from sparsejax.moe import STATES, expert_load
from sparsejax.moe.routers import MOST, Routing, assignment, relu, top_k
from sparsejax.moe.sources import moved_means, moved_penalty
from tests.moe.routed import (
    BATCH,
    EXPERTS,
    TOKENS,
    choices,
    compiled,
    logits_of,
    route,
)
from tests.moe.routed import dense as _dense

KEY = jax.random.key(0)
auction, base, expert_choice, expert_choice_by_position, s_base = map(
    compiled,
    (
        assignment.auction,
        assignment.base,
        assignment.expert_choice,
        assignment.expert_choice_by_position,
        assignment.s_base,
    ),
)
selective_sinkhorn, sinkhorn = map(
    compiled, (assignment.selective_sinkhorn, assignment.sinkhorn)
)
block_ffn, chunk_sparsity, remoe = map(
    compiled, (relu.block_ffn, relu.chunk_sparsity, relu.remoe)
)
cosine_top_k, k_means, softmax_top_k = map(
    compiled, (top_k.cosine_top_k, top_k.k_means, top_k.softmax_top_k)
)
dense = jax.jit(_dense)


@functools.cache
def skewed():
    """Logits with which a greedy choice crowds the last experts."""
    return logits_of(0) + jnp.linspace(-3, 3, EXPERTS)[None]


def best_total(scores):
    """The most that an exactly balanced assignment can reach."""
    columns = np.repeat(np.asarray(scores), TOKENS // EXPERTS, axis=1)
    rows, chosen = linear_sum_assignment(columns, maximize=True)
    return columns[rows, chosen].sum()


def total(scores, chosen):
    return float(jnp.take_along_axis(scores, chosen[:, None], axis=1).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_auction_is_balanced_and_near_the_best_assignment(seed):
    scores = logits_of(seed) + jnp.linspace(-3, 3, EXPERTS)[None]
    chosen = auction(scores, precision=1e-3)
    counts = np.bincount(chosen, minlength=EXPERTS)
    np.testing.assert_array_equal(counts, TOKENS // EXPERTS)
    lost = best_total(scores) - total(scores, chosen)
    assert -1e-3 <= lost <= TOKENS * 1e-3 * float(jnp.ptp(scores)) + 1e-3


def test_an_auction_of_integers_is_exact():
    scores = jnp.round(4 * logits_of(3))
    precision = 0.9 / TOKENS / float(jnp.ptp(scores))
    chosen = auction(scores, precision=precision)
    assert total(scores, chosen) == best_total(scores)


def test_an_auction_shares_the_valid_tokens_only():
    valid = jnp.arange(TOKENS) % 2 == 0
    chosen = auction(skewed(), valid=valid)
    counts = np.bincount(chosen[valid], minlength=EXPERTS)
    assert counts.max() == -(-(TOKENS // 2) // EXPERTS)


def test_base_is_balanced_in_training_and_greedy_otherwise():
    training, plain = base(skewed(), key=KEY), base(skewed())
    np.testing.assert_array_equal(expert_load(training), TOKENS / EXPERTS)
    np.testing.assert_array_equal(plain.experts[:, 0], skewed().argmax(axis=1))
    gradient = jax.grad(lambda x: base(x, key=KEY).weights.sum())(skewed())
    reached = (gradient != 0).sum(axis=1)
    np.testing.assert_array_equal(reached, 1)  # the weight alone


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_sinkhorn_meets_its_marginals(temperature):
    plan = sinkhorn(skewed(), temperature=temperature, iterations=2000)
    np.testing.assert_allclose(plan.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(axis=0), TOKENS / EXPERTS, rtol=1e-3)


def test_sinkhorn_in_logarithms_is_sinkhorn():
    kernel = np.exp(np.float64(skewed()))
    u, v = np.ones(TOKENS), np.ones(EXPERTS)
    for _ in range(500):
        v = TOKENS / EXPERTS / (kernel.T @ u)
        u = 1 / (kernel @ v)
    expected = u[:, None] * kernel * v[None]
    plan = sinkhorn(skewed(), temperature=1.0, iterations=500)
    np.testing.assert_allclose(plan, expected, atol=1e-3)


def test_a_cold_plan_is_the_best_assignment():
    scores = jnp.round(4 * logits_of(3)) + 0.01 * logits_of(4)
    plan = sinkhorn(scores, temperature=0.02, iterations=20_000)
    reached = float((plan * scores).sum())
    assert abs(reached - best_total(scores)) < 0.02 * TOKENS


def test_sinkhorn_gives_padding_nothing():
    valid = jnp.arange(TOKENS) < 16
    plan = sinkhorn(skewed().at[16:].set(jnp.nan), valid=valid, iterations=2000)
    assert not plan[16:].any()
    np.testing.assert_allclose(plan.sum(axis=0), 16 / EXPERTS, rtol=1e-3)
    assert jnp.isfinite(sinkhorn(skewed(), valid=jnp.zeros(TOKENS, bool))).all()


def test_s_base_balances_in_training_and_weighs_by_the_logits():
    training, plain = s_base(skewed(), k=2, key=KEY), s_base(skewed(), k=2)
    spread = [float(expert_load(r).std()) for r in (training, plain)]
    assert spread[0] < spread[1] / 2
    expected = jnp.take_along_axis(training.probs, training.experts, axis=1)
    np.testing.assert_array_equal(training.weights, expected)
    greedy = softmax_top_k(skewed(), k=2).experts
    np.testing.assert_array_equal(plain.experts, greedy)


def test_selective_sinkhorn_trains_no_router_in_the_steps_with_a_plan():
    def weights(x, probability):
        routing = selective_sinkhorn(x, k=2, key=KEY, probability=probability)
        return jnp.square(routing.weights).sum()

    gradient = jax.grad(weights)
    assert not gradient(skewed(), 1.0).any()
    assert gradient(skewed(), 0.0).any()


def test_selective_sinkhorn_is_balanced_with_a_plan_and_plain_otherwise():
    planned = selective_sinkhorn(skewed(), k=2, key=KEY, probability=1.0)
    plain = softmax_top_k(skewed(), k=2)
    assert expert_load(planned).std() < expert_load(plain).std() / 2
    plan = sinkhorn(skewed(), temperature=0.1)
    kept = jnp.take_along_axis(plan, planned.experts, axis=1)
    expected = kept / kept.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(planned.weights, expected, rtol=1e-5)
    for probability in (0.0, 1.0):  # at evaluation it plays no part
        routing = selective_sinkhorn(skewed(), k=2, probability=probability)
        np.testing.assert_array_equal(routing.experts, plain.experts)
        np.testing.assert_allclose(routing.weights, plain.weights, rtol=1e-5)
    noise = jax.random.normal(jax.random.split(KEY)[1], (TOKENS, EXPERTS)) / EXPERTS
    noisy = selective_sinkhorn(skewed(), k=2, key=KEY, probability=0.0)
    expected = softmax_top_k(skewed() + noise, k=2)
    np.testing.assert_allclose(dense(noisy), dense(expected), rtol=1e-5, atol=1e-6)


def test_expert_choice_gives_every_expert_as_many_tokens():
    load = expert_load(expert_choice(skewed(), k=2))
    np.testing.assert_array_equal(load, 2 * TOKENS / EXPERTS)
    load = expert_load(expert_choice_by_position(skewed(), k=2, batch=BATCH))
    np.testing.assert_array_equal(load, TOKENS / BATCH)  # one row of each position


@pytest.mark.parametrize("name", MOST)
def test_no_expert_gets_more_visits_than_its_router_promises(name):
    routing = route(name, logits_of(0))
    load = np.asarray(expert_load(routing))
    assert (load == MOST[name](TOKENS, BATCH, EXPERTS, choices(name))).all()
    few = route(name, logits_of(0), valid=jnp.arange(TOKENS) % 3 > 0)
    assert (np.asarray(expert_load(few)) <= load).all()


def test_expert_choice_of_all_is_a_dense_mixture():
    for router in (expert_choice, expert_choice_by_position):
        routing = router(skewed(), k=EXPERTS)
        np.testing.assert_array_equal(dense(routing), jax.nn.softmax(skewed()))


def test_expert_choice_by_position_reads_no_later_token_as_the_plain_one_does():
    length = TOKENS // BATCH
    last = jnp.arange(TOKENS) % length == length - 1
    changed = jnp.where(last[:, None], 9.0, skewed())

    def moved(router, **more):
        a, b = (dense(router(x, k=1, **more)) for x in (skewed(), changed))
        return bool((a != b)[~last].any())

    assert moved(expert_choice)
    assert not moved(expert_choice_by_position, batch=BATCH)


def test_cosine_routing_is_softmax_of_cosines():
    a, b = cosine_top_k(skewed(), k=2), softmax_top_k(skewed(), k=2)
    np.testing.assert_array_equal(a.weights, b.weights)


def routed_to(experts, probs):
    return Routing(experts, jnp.ones(experts.shape), probs, {})


def test_means_move_towards_what_visits_them_and_rest_otherwise():
    x = jax.random.normal(KEY, (6, 3))
    chosen = jnp.asarray([[0], [1], [0], [0], [1], [2]], jnp.int32)
    valid = jnp.asarray([True, True, True, False, True, False])
    means = jax.random.normal(jax.random.key(1), (4, 3))
    sums = STATES["means"].evidence(x, routed_to(chosen, jnp.zeros((6, 4))), valid)
    moved = moved_means(means, sums, 0.25)
    expected = np.array(means)
    for expert, members in ((0, [0, 2]), (1, [1, 4])):
        mean = np.asarray(x)[members].mean(axis=0)
        expected[expert] = 0.75 * expected[expert] + 0.25 * mean
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
    np.testing.assert_array_equal(moved_means(means, sums, 0.0), means)


def test_k_means_finds_blobs():
    """Eight far blobs; means begin near them, and end in their middle."""
    centers = 5 * jnp.eye(EXPERTS)
    of = jnp.arange(256) % EXPERTS
    x = centers[of] + jax.random.normal(KEY, (256, EXPERTS))
    means = centers + 2 * jax.random.normal(jax.random.key(1), centers.shape)

    def step(means, _):
        unit = [a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (x, means)]
        routing = k_means(unit[0] @ unit[1].T, k=1)
        sums = STATES["means"].evidence(x, routing, None)
        return moved_means(means, sums, 0.1), routing.experts[:, 0]

    means, chosen = jax.lax.scan(step, means, None, length=100)
    assert (chosen[-1] == of).all()
    found = jax.ops.segment_sum(x, of, EXPERTS) / 32
    np.testing.assert_allclose(means, found, atol=1e-3)


def test_remoe_is_continuous_where_an_expert_comes_in():
    def output(offset, router):
        logits = jnp.asarray([[1.0, offset, -1.0]])
        return dense(router(logits, k=1))

    jump = {
        name: float(jnp.abs(output(at + 1e-4, r) - output(at - 1e-4, r)).max())
        for name, r, at in (("remoe", remoe, 0.0), ("top", softmax_top_k, 1.0))
    }
    assert jump["remoe"] < 1e-3
    assert jump["top"] > 0.5


def test_remoe_taxes_crowded_experts_by_the_written_out_sum():
    routing = remoe(skewed(), k=2, penalty=jnp.asarray(0.5))
    gates = np.maximum(np.float64(skewed()), 0)
    crowd = (gates > 0).mean(axis=0) * EXPERTS / 2
    expected = 0.5 * (crowd * gates.mean(axis=0)).sum()
    np.testing.assert_allclose(routing.losses["sparsity"], expected, rtol=1e-5)
    assert remoe(skewed(), k=2).losses["sparsity"] == 0


def test_the_penalty_of_remoe_reaches_the_density_asked_for():
    """Logits that follow their gradient, pulled to where half of them are positive."""
    wanted = logits_of(0, 1.0, tokens=64)

    def step(state, _):
        logits, penalty = state

        def loss(logits):
            routing = remoe(logits, k=2, penalty=penalty)
            pull = jnp.square(logits - wanted).mean()
            return pull + routing.losses["sparsity"], routing

        gradient, routing = jax.grad(loss, has_aux=True)(logits)
        density = STATES["penalty"].evidence(logits, routing, None)
        penalty = moved_penalty(penalty, density, 2 / EXPERTS, 1.05)
        return (logits - 20 * gradient, penalty), density

    start = wanted, jnp.asarray(1e-3)
    _, density = jax.lax.scan(step, start, None, length=600)
    assert density[0] > 0.4
    assert abs(float(density[-200:].mean()) - 2 / EXPERTS) < 0.03


def test_block_ffn_ignores_the_scale_of_its_logits_and_keeps_zeros():
    a, b = (block_ffn(s * skewed(), k=2) for s in (1.0, 7.0))
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-4)
    np.testing.assert_array_equal(a.weights > 0, skewed() > 0)
    size = jnp.square(a.weights).mean(axis=1)
    np.testing.assert_allclose(size, 1, rtol=1e-4)
    nothing = block_ffn(-jnp.abs(skewed()) - 1, k=2)
    assert not nothing.weights.any()
    assert all(jnp.isfinite(x) for x in nothing.losses.values())


def test_chunk_sparsity_is_the_written_out_product():
    mass = np.asarray(jax.nn.softmax(logits_of(1))).reshape(BATCH, -1, EXPERTS)
    live = np.ones(mass.shape[:2], bool)
    live[1, 4:] = False
    mass = np.where(live[..., None], mass, 0)
    chunks = [
        1 - np.prod(1 - row[start : start + 4], axis=0)
        for row, at in zip(mass, live, strict=True)
        for start in (0, 4)  # six tokens: a chunk of four and one of two
        if at[start : start + 4].any()
    ]
    found = chunk_sparsity(jnp.asarray(mass), jnp.asarray(live), 4)
    np.testing.assert_allclose(found, np.mean(chunks), rtol=1e-5)


def test_a_chunk_of_one_token_costs_one_expert():
    mass = jax.nn.softmax(logits_of(1)).reshape(BATCH, -1, EXPERTS)
    live = jnp.ones(mass.shape[:2], bool)
    np.testing.assert_allclose(chunk_sparsity(mass, live, 1), 1 / EXPERTS, rtol=1e-5)
    wider = [float(chunk_sparsity(mass, live, n)) for n in (1, 2, 3, 6)]
    assert wider == sorted(wider)


def test_neighbours_that_agree_cost_block_ffn_less():
    row = jnp.where(jnp.arange(EXPERTS) < 2, 1.0, -1.0)
    agree = jnp.tile(row[None], (TOKENS, 1))
    shift = jnp.stack([jnp.roll(row, n) for n in range(TOKENS)])
    a, b = (block_ffn(x, k=2).losses["locality"] for x in (agree, shift))
    assert a < b / 2
