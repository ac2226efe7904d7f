"""Routers: what all of them keep to, and what each one claims."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from sparsejax.moe import ROUTERS
from sparsejax.moe.routers import (
    _best,
    accepts,
    settings,
    sigma_moe,
    sigmoid_top_k,
    softmax_top_k,
    switch,
    top_k_softmax,
)

TOKENS, EXPERTS = 24, 8
NAMES = sorted(ROUTERS)


def logits_of(seed, spread=2.0):
    return spread * jax.random.normal(jax.random.key(seed), (TOKENS, EXPERTS))


def choices(name):
    return 1 if name == "switch" else 3


@functools.partial(jax.jit, static_argnums=0)
def route(name, logits, **context):
    return ROUTERS[name](logits, k=choices(name), **context)


best = jax.jit(_best, static_argnums=1)
softmax_first = jax.jit(softmax_top_k, static_argnames="k")
softmax_last = jax.jit(top_k_softmax, static_argnames="k")


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 50.0]))
def test_router_visits_k_distinct_experts(name, seed, spread):
    routing = route(name, logits_of(seed, spread))
    chosen = np.sort(routing.experts, axis=1)
    assert chosen.min() >= 0
    assert chosen.max() < EXPERTS
    assert (np.diff(chosen, axis=1) > 0).all()
    assert (routing.weights >= 0).all()
    assert jnp.isfinite(routing.weights).all()
    np.testing.assert_allclose(routing.probs.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_router_is_equivariant_to_the_order_of_experts(name):
    logits = logits_of(0)
    order = jax.random.permutation(jax.random.key(1), EXPERTS)
    plain, permuted = route(name, logits), route(name, logits[:, order])
    np.testing.assert_array_equal(order[permuted.experts], plain.experts)
    np.testing.assert_allclose(permuted.weights, plain.weights, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_router_computes_in_float32(name):
    low = logits_of(0).astype(jnp.bfloat16)
    a, b = route(name, low), route(name, low.astype(jnp.float32))
    assert a.weights.dtype == a.probs.dtype == jnp.float32
    np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_array_equal(a.weights, b.weights)


@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_the_lower_index(name):
    routing = route(name, jnp.zeros((2, EXPERTS)))
    np.testing.assert_array_equal(routing.experts, [list(range(choices(name)))] * 2)


@given(seed=st.integers(0, 1000), floor=st.sampled_from([-jnp.inf, -1.0, 0.0]))
def test_best_is_top_k_with_ties_and_infinities(seed, floor):
    scores = jnp.maximum(jnp.round(logits_of(seed)), 0)
    scores = jnp.where(scores > 2, floor, scores)
    for k in (1, 5, EXPERTS):
        np.testing.assert_array_equal(best(scores, k), jax.lax.top_k(scores, k)[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_bias_changes_nothing(name):
    logits = logits_of(0)
    plain = route(name, logits)
    biased = route(name, logits, bias=jnp.full(EXPERTS, -3.0))
    np.testing.assert_array_equal(plain.experts, biased.experts)
    np.testing.assert_array_equal(plain.weights, biased.weights)


@pytest.mark.parametrize("name", NAMES)
def test_bias_moves_the_choice_but_not_the_weights(name):
    """Logits that prefer the forced experts give the weights without a bias."""
    logits, k = logits_of(0), choices(name)
    forced = jnp.arange(EXPERTS - k, EXPERTS)
    routing = route(name, logits, bias=jnp.zeros(EXPERTS).at[forced].set(100.0))
    np.testing.assert_array_equal(np.sort(routing.experts, axis=1), [forced] * TOKENS)
    scores = {
        "sigmoid_top_k": jax.nn.sigmoid(logits),
        "sigma_moe": jax.nn.sigmoid(logits),
        "top_k_softmax": jnp.exp(logits),
    }.get(name, jax.nn.softmax(logits))
    expected = jnp.take_along_axis(scores, routing.experts, axis=1)
    if name not in ("switch", "sigma_moe"):
        expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(routing.weights, expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bias_receives_no_gradient(name):
    def total(bias):
        routing = route(name, logits_of(0), bias=bias)
        return jnp.square(routing.weights).sum() + jnp.square(routing.probs).sum()

    assert not jax.grad(total)(jnp.arange(EXPERTS) / EXPERTS).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [0, EXPERTS + 1])
def test_more_experts_than_there_are_are_refused(name, k):
    with pytest.raises(ValueError, match=f"k={k}: "):
        ROUTERS[name](logits_of(0), k=k)


@given(seed=st.integers(0, 1000), k=st.sampled_from([1, 3, EXPERTS]))
def test_softmax_then_renormalise_is_softmax_of_the_kept(seed, k):
    a, b = (route(logits_of(seed), k=k) for route in (softmax_first, softmax_last))
    np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-5)


def test_switch_keeps_the_probability_in_the_graph():
    routing = switch(logits_of(0))
    np.testing.assert_allclose(routing.weights[:, 0], routing.probs.max(axis=1))
    gradient = jax.grad(lambda x: switch(x).weights.sum())(logits_of(0))
    assert (jnp.abs(gradient).sum(axis=1) > 0).all()


@pytest.mark.parametrize(
    ("router", "reaches"),
    [(lambda x: softmax_top_k(x, k=2, renormalize=False), True),
     (lambda x: softmax_top_k(x, k=2), False),
     (lambda x: sigma_moe(x, k=2), False)],
    ids=["softmax over all", "renormalised", "sigmoid"],
)  # fmt: skip
def test_weights_move_unchosen_logits_only_through_a_softmax_over_all(router, reaches):
    logits = logits_of(0)
    gradient = jax.grad(lambda x: jnp.square(router(x).weights).sum())(logits)
    unchosen = ~jax.nn.one_hot(router(logits).experts, EXPERTS).any(axis=1)
    # Renormalised, the unchosen logits cancel to rounding.
    assert (jnp.abs(gradient[unchosen]).max() > 1e-3) == reaches


def test_group_limit_visits_few_groups():
    routing = sigmoid_top_k(logits_of(0), k=3, groups=4, kept_groups=2)
    groups = [len(set(row)) for row in (np.asarray(routing.experts) // 2).tolist()]
    assert max(groups) == 2
    free = sigmoid_top_k(logits_of(0), k=3)
    assert max(len(set(r)) for r in (np.asarray(free.experts) // 2).tolist()) == 3


def test_keeping_every_group_is_no_limit():
    a = sigmoid_top_k(logits_of(0), k=3, groups=4, kept_groups=4)
    b = sigmoid_top_k(logits_of(0), k=3)
    np.testing.assert_array_equal(a.experts, b.experts)


def test_a_group_is_as_good_as_its_two_best():
    logits = jnp.asarray([[3.0, -9, -9, -9, 2, 2, -9, -9]])
    routing = sigmoid_top_k(logits, k=2, groups=2, kept_groups=1)
    np.testing.assert_array_equal(np.sort(routing.experts), [[4, 5]])


def test_a_negative_biased_score_still_beats_every_other_group():
    bias = jnp.full(EXPERTS, -2.0)
    routing = sigmoid_top_k(logits_of(0), k=3, bias=bias, groups=4, kept_groups=2)
    plain = sigmoid_top_k(logits_of(0), k=3, groups=4, kept_groups=2)
    np.testing.assert_array_equal(routing.experts, plain.experts)


def test_scale_multiplies_the_weights():
    routing = sigmoid_top_k(logits_of(0), k=3, scale=2.5)
    np.testing.assert_allclose(routing.weights.sum(axis=1), 2.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("groups", "kept", "message"),
    [(3, 1, "groups=3: must divide"), (4, 5, "kept_groups=5"), (4, 1, "leave k=3")],
)
def test_impossible_groups_are_refused(groups, kept, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_top_k(logits_of(0), k=3, groups=groups, kept_groups=kept)


def test_switch_refuses_a_second_choice():
    with pytest.raises(ValueError, match="k=2: switch visits one expert"):
        switch(logits_of(0), k=2)


def test_sigma_moe_entropy_is_least_when_the_mean_choice_is_uniform():
    one_each = 50 * jnp.eye(EXPERTS)  # sure of every token, uniform on average
    loss = sigma_moe(one_each, k=1, entropy_weight=1.0).losses["router_entropy"]
    np.testing.assert_allclose(loss, -np.log(EXPERTS), rtol=1e-5)
    random = sigma_moe(logits_of(0), k=1, entropy_weight=1.0).losses["router_entropy"]
    assert random > loss


def test_sigma_moe_entropy_ignores_padding():
    logits, valid = logits_of(0), jnp.arange(TOKENS) < 10
    poisoned = logits.at[10:].set(1e4)
    a = sigma_moe(poisoned, k=2, valid=valid).losses["router_entropy"]
    b = sigma_moe(logits[:10], k=2).losses["router_entropy"]
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_context_and_settings_are_read_from_the_signature():
    assert accepts(sigma_moe) == {"bias", "valid"}
    assert settings(sigma_moe) == {"entropy_weight": 1e-3}
    assert settings(switch) == {}
