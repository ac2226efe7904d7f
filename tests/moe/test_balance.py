"""Balance: minima of the losses, what padding may not touch, and the bias loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.moe import (
    Routing,
    balance_loss,
    expert_load,
    limited,
    metrics,
    updated_bias,
    z_loss,
)
from sparsejax.moe.routers import sigmoid_top_k, softmax_top_k

TOKENS, EXPERTS = 32, 8


def logits_of(seed):
    return jax.random.normal(jax.random.key(seed), (TOKENS, EXPERTS))


def round_robin(k):
    chosen = (jnp.arange(TOKENS)[:, None] + jnp.arange(k)[None]) % EXPERTS
    probs = jnp.full((TOKENS, EXPERTS), 1 / EXPERTS)
    return Routing(chosen.astype(jnp.int32), jnp.ones((TOKENS, k)), probs, {})


@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_balance_loss_is_one_when_balanced(k):
    np.testing.assert_allclose(balance_loss(round_robin(k)), 1, rtol=1e-6)


def test_balance_loss_of_one_crowded_expert_is_experts_times_its_probability():
    logits = jnp.tile(jnp.asarray([[5.0] + [0.0] * (EXPERTS - 1)]), (TOKENS, 1))
    routing = softmax_top_k(logits, k=1)
    expected = EXPERTS * routing.probs[0, 0]
    np.testing.assert_allclose(balance_loss(routing), expected, rtol=1e-6)


def test_balance_loss_is_the_written_out_sum():
    routing = softmax_top_k(logits_of(0), k=3)
    share = np.bincount(np.ravel(routing.experts), minlength=EXPERTS) / (3 * TOKENS)
    expected = EXPERTS * (share * np.asarray(routing.probs).mean(axis=0)).sum()
    np.testing.assert_allclose(balance_loss(routing), expected, rtol=1e-6)


def test_balance_loss_pushes_the_crowded_expert_down():
    logits = logits_of(0).at[:, 2].add(4.0)
    gradient = jax.grad(lambda x: balance_loss(softmax_top_k(x, k=2)))(logits)
    assert (gradient[:, 2] > 0).all()


@pytest.mark.parametrize("poison", [0.0, jnp.nan])
def test_padding_enters_no_statistic(poison):
    valid = jnp.arange(TOKENS) < 20
    logits = logits_of(0)
    routing, short = (softmax_top_k(x, k=2) for x in (logits, logits[:20]))
    dead = ~valid[:, None]
    routing = routing._replace(probs=jnp.where(dead, poison, routing.probs))
    padded = metrics(routing, valid=valid)
    for name, value in metrics(short).items():
        np.testing.assert_allclose(padded[name], value, rtol=1e-5, err_msg=name)
    a = (
        balance_loss(routing, valid=valid),
        z_loss(jnp.where(dead, poison, logits), valid=valid),
    )
    np.testing.assert_allclose(a, (balance_loss(short), z_loss(logits[:20])), rtol=1e-5)


def test_only_padding_gives_finite_numbers():
    routing, nothing = softmax_top_k(logits_of(0), k=2), jnp.zeros(TOKENS, bool)
    values = metrics(routing, limited(routing, 1), valid=nothing)
    assert all(jnp.isfinite(v).all() for v in values.values())
    assert balance_loss(routing, valid=nothing) == 0
    assert z_loss(logits_of(0), valid=nothing) == 0


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits = np.float64(logits_of(0))
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
    np.testing.assert_allclose(z_loss(logits_of(0)), expected, rtol=1e-5)


def test_load_counts_used_slots_only():
    routing = round_robin(2)
    unused = routing._replace(weights=routing.weights.at[:5, 1].set(0))
    counts = np.bincount(np.ravel(routing.experts), minlength=EXPERTS)
    np.testing.assert_array_equal(expert_load(routing), counts)
    assert float(expert_load(unused).sum()) == counts.sum() - 5


def test_metrics_of_an_even_load():
    values = metrics(round_robin(2))
    zero = ("load_deviation", "load_violation", "dead_experts")
    one = ("load_minimum", "load_entropy", "router_entropy")
    assert all(abs(values[name]) < 1e-6 for name in zero)
    assert all(abs(values[name] - 1) < 1e-5 for name in one)
    np.testing.assert_allclose(values["router_confidence"], 1 / EXPERTS)
    sure = round_robin(1)._replace(probs=jnp.eye(EXPERTS)[jnp.arange(TOKENS) % 2])
    assert metrics(sure)["router_confidence"] == 1
    half = np.log(2) / np.log(EXPERTS)  # of two experts, one each
    np.testing.assert_allclose(metrics(sure)["router_entropy"], half, rtol=1e-5)


def test_metrics_of_a_crowded_load():
    routing = round_robin(1)._replace(experts=jnp.zeros((TOKENS, 1), jnp.int32))
    values = metrics(routing)
    assert values["load_violation"] == EXPERTS - 1
    np.testing.assert_allclose(values["load_deviation"], np.sqrt(EXPERTS - 1))
    assert values["dead_experts"] == (EXPERTS - 1) / EXPERTS
    assert values["load_entropy"] == values["load_minimum"] == 0


def test_visits_are_those_of_a_mean_token_that_counts():
    routing = round_robin(2)
    weights = routing.weights.at[:6, 1].set(0)
    valid = jnp.arange(TOKENS) < 12
    values = metrics(routing._replace(weights=weights), valid=valid)
    np.testing.assert_allclose(values["visits"], 1.5)
    assert values["load"].sum() == 1.5 * 12


def test_metrics_count_what_a_limit_drops():
    routing = round_robin(1)._replace(experts=jnp.zeros((TOKENS, 1), jnp.int32))
    values = metrics(routing, limited(routing, 8))
    assert values["dropped"] == values["left_behind"] == 1 - 8 / TOKENS


def test_a_single_expert_has_metrics():
    routing = softmax_top_k(jnp.zeros((4, 1)), k=1)
    assert all(jnp.isfinite(v).all() for v in metrics(routing).values())


def test_bias_loop_balances_a_frozen_router():
    logits = jax.random.normal(jax.random.key(0), (512, EXPERTS))
    logits = logits + jnp.linspace(-1, 1, EXPERTS)[None]

    def step(bias, _):
        load = expert_load(sigmoid_top_k(logits, k=2, bias=bias))
        return updated_bias(bias, load, 2e-3), load.max() / load.mean() - 1

    _, violation = jax.lax.scan(step, jnp.zeros(EXPERTS), None, length=400)
    assert violation[0] > 0.5
    assert violation[-1] < 0.1


def test_bias_update_is_a_sign_step_of_each_layer():
    load = jnp.asarray([[4.0, 2, 0], [1, 1, 4]])
    bias = updated_bias(jnp.zeros((2, 3)), load, 0.5)
    np.testing.assert_array_equal(bias, [[-0.5, 0, 0.5], [0.5, 0.5, -0.5]])


def test_bias_rate_zero_changes_nothing():
    bias = jnp.arange(3.0)
    np.testing.assert_array_equal(
        updated_bias(bias, jnp.asarray([9.0, 0, 0]), 0.0), bias
    )
