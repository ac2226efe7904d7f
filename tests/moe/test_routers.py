"""Routers: what all of them keep to, and what those of a score each claim."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from sparsejax.moe import ROUTERS
from sparsejax.moe.routers import accepts, settings, sigmoid, top_k
from tests.moe.routed import (
    EXPERTS,
    TOKENS,
    choices,
    compiled,
    context,
    dense,
    logits_of,
    route,
)

NAMES = sorted(ROUTERS)
BIASED = [name for name in NAMES if "bias" in accepts(ROUTERS[name])]
PADDED = [name for name in NAMES if "valid" in accepts(ROUTERS[name])]
TRAINED = [name for name in NAMES if "key" in accepts(ROUTERS[name])]
SCORED = [name for name in NAMES if "blank" not in accepts(ROUTERS[name])]

sigma_moe, sigmoid_top_k = map(compiled, (sigmoid.sigma_moe, sigmoid.sigmoid_top_k))
noisy_top_k, softmax_top_k, switch, top_k_softmax = map(
    compiled,
    (top_k.noisy_top_k, top_k.softmax_top_k, top_k.switch, top_k.top_k_softmax),
)


def assert_is_a_routing(routing):
    used = np.asarray(routing.weights) != 0
    chosen = np.asarray(routing.experts)
    assert chosen.min() >= 0
    assert chosen.max() < EXPERTS
    assert all(len(set(c[u])) == u.sum() for c, u in zip(chosen, used, strict=True))
    assert (routing.weights >= 0).all()
    assert jnp.isfinite(routing.weights).all()
    assert all(jnp.isfinite(loss) for loss in routing.losses.values())
    np.testing.assert_allclose(routing.probs.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 50.0]))
def test_router_visits_distinct_experts(name, seed, spread):
    assert_is_a_routing(route(name, logits_of(seed, spread)))


@pytest.mark.parametrize("name", TRAINED)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 50.0]))
def test_router_in_training_visits_distinct_experts(name, seed, spread):
    key = jax.random.key(seed)
    assert_is_a_routing(route(name, logits_of(seed, spread), key=key))


@pytest.mark.parametrize("name", SCORED)
def test_router_is_equivariant_to_the_order_of_experts(name):
    logits, order = logits_of(0), jax.random.permutation(jax.random.key(1), EXPERTS)
    noise = logits_of(7, 0.1)
    plain = route(name, logits, noise=noise)
    permuted = route(name, logits[:, order], noise=noise[:, order])
    np.testing.assert_allclose(dense(permuted), dense(plain)[:, order], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_router_computes_in_float32(name):
    low = logits_of(0).astype(jnp.bfloat16)
    a, b = route(name, low), route(name, low.astype(jnp.float32))
    assert a.weights.dtype == a.probs.dtype == jnp.float32
    np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_array_equal(a.weights, b.weights)


@pytest.mark.parametrize("name", SCORED)
def test_ties_go_to_the_lower_index(name):
    routing = route(name, jnp.ones((TOKENS, EXPERTS)))
    first = np.asarray(routing.experts)[:, : choices(name)]
    np.testing.assert_array_equal(first, [list(range(choices(name)))] * TOKENS)


@pytest.mark.parametrize("name", BIASED)
def test_a_constant_bias_changes_nothing(name):
    logits = logits_of(0)
    plain = route(name, logits)
    biased = route(name, logits, bias=jnp.full(EXPERTS, -3.0))
    np.testing.assert_array_equal(plain.experts, biased.experts)
    np.testing.assert_array_equal(plain.weights, biased.weights)


@pytest.mark.parametrize("name", BIASED)
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


@pytest.mark.parametrize("name", BIASED)
def test_bias_receives_no_gradient(name):
    def total(bias):
        routing = route(name, logits_of(0), bias=bias)
        return jnp.square(routing.weights).sum() + jnp.square(routing.probs).sum()

    assert not jax.grad(total)(jnp.arange(EXPERTS) / EXPERTS).any()


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing_of_the_others(name, training):
    key = jax.random.key(0) if training and name in TRAINED else None
    more = {"valid": jnp.arange(TOKENS) < 15} | ({} if key is None else {"key": key})
    logits = logits_of(0)
    clean = route(name, logits, **more)
    poisoned = route(name, logits.at[15:].set(1e4), **more)
    np.testing.assert_array_equal(clean.experts[:15], poisoned.experts[:15])
    np.testing.assert_allclose(clean.weights[:15], poisoned.weights[:15], rtol=1e-5)
    for loss in clean.losses:
        a, b = clean.losses[loss], poisoned.losses[loss]
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [0, EXPERTS + 1])
def test_more_experts_than_there_are_are_refused(name, k):
    with pytest.raises(ValueError, match=f"k={k}: "):
        ROUTERS[name](logits_of(0), k=k, **context(name))


@given(seed=st.integers(0, 1000), k=st.sampled_from([1, 3, EXPERTS]))
def test_top_k_softmax_is_softmax_top_k_renormalised(seed, k):
    a, b = (route(logits_of(seed), k=k) for route in (softmax_top_k, top_k_softmax))
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


def test_sigmoid_top_k_judges_a_group_by_its_two_best():
    logits = jnp.asarray([[3.0, -9, -9, -9, 2, 2, -9, -9]])
    routing = sigmoid_top_k(logits, k=2, groups=2, kept_groups=1)
    np.testing.assert_array_equal(np.sort(routing.experts), [[4, 5]])
    other = softmax_top_k(logits, k=2, groups=2, kept_groups=1)
    np.testing.assert_array_equal(np.sort(other.experts), [[0, 1]])  # its best one


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


def test_a_dropped_expert_is_not_visited_in_training_alone():
    logits = logits_of(0)
    drop = {"k": 2, "expert_dropout": 0.5}
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, logits.shape)
    found = sigma_moe(logits, **drop, key=jax.random.key(0))
    expected = sigma_moe(jnp.where(kept, logits, -jnp.inf), k=2)
    live = np.asarray(expected.weights) > 0
    np.testing.assert_array_equal(np.asarray(found.weights) > 0, live)
    chosen = [np.where(live, r.experts, -1) for r in (found, expected)]
    np.testing.assert_array_equal(*chosen)
    np.testing.assert_allclose(found.weights, expected.weights)
    assert (~kept).sum() > logits.size // 4
    plain, without = sigma_moe(logits, k=2), sigma_moe(logits, **drop)
    np.testing.assert_array_equal(plain.experts, without.experts)


def test_sigma_moe_entropy_ignores_padding():
    logits, valid = logits_of(0), jnp.arange(TOKENS) < 10
    poisoned = logits.at[10:].set(1e4)
    a = sigma_moe(poisoned, k=2, valid=valid).losses["router_entropy"]
    b = sigma_moe(logits[:10], k=2).losses["router_entropy"]
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_sources_and_settings_are_read_from_the_signature():
    assert accepts(sigmoid.sigma_moe) == {"logits", "bias", "valid", "key"}
    own = {"entropy_weight": 1e-3, "expert_dropout": 0.0}
    assert settings(sigmoid.sigma_moe) == own
    assert settings(top_k.switch) == {}
    found = settings(top_k.noisy_top_k)
    assert found == {"importance_weight": 0.1, "load_weight": 0.1}


def test_noisy_top_k_loads_are_chances_of_a_visit_were_the_noise_drawn_again():
    """By drawing, for one expert at a time, its noise and nobody else's."""
    logits, raw, key = logits_of(0)[:3], logits_of(1)[:3], jax.random.key(5)
    scale = np.asarray(jax.nn.softplus(raw)) + 1e-2
    noisy = np.asarray(logits + scale * jax.random.normal(key, logits.shape))
    drawn = np.random.default_rng(0).normal(size=20_000)
    visits = np.zeros(EXPERTS)
    for token, expert in np.ndindex(*logits.shape):
        others = np.sort(np.delete(noisy[token], expert))
        again = float(logits[token, expert]) + scale[token, expert] * drawn
        visits[expert] += (again > others[-2]).mean() / 3
    expected = visits.var() / visits.mean() ** 2
    losses = noisy_top_k(logits, k=2, noise=raw, key=key, load_weight=1.0).losses
    np.testing.assert_allclose(losses["load"], expected, rtol=0.05)


def test_all_experts_are_visited_whatever_the_noise():
    def load(raw):
        routing = noisy_top_k(logits_of(0), k=EXPERTS, noise=raw, key=jax.random.key(0))
        return routing.losses["load"]

    value, slope = jax.value_and_grad(load)(logits_of(1))
    assert value == 0
    assert not slope.any()


def test_an_expert_takes_its_share_of_the_tokens_that_count():
    choose, logits = ROUTERS["expert_choice"], logits_of(0)
    alone = choose(logits[:8], k=2)
    padded = choose(logits[:16], k=2, valid=jnp.arange(16) < 8)
    np.testing.assert_array_equal(alone.weights, padded.weights[:8])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("s_base", {"temperature": 0.0}), ("base", {"precision": 0.0})],
)
def test_settings_that_would_never_end_are_refused(name, wrong):
    with pytest.raises(ValueError, match="must be positive"):
        ROUTERS[name](logits_of(0), k=1, key=jax.random.key(0), **wrong)


def test_noisy_top_k_losses_reach_logits_and_noise_and_vanish_when_even():
    def load(logits, raw):
        routing = noisy_top_k(logits, k=2, noise=raw, key=jax.random.key(0))
        return routing.losses["load"]

    for gradient in jax.grad(load, (0, 1))(logits_of(0), logits_of(1)):
        assert jnp.abs(gradient).max() > 0
    even = noisy_top_k(3 * jnp.eye(EXPERTS), k=1).losses
    assert max(float(x) for x in even.values()) < 1e-6
    crowded = noisy_top_k(jnp.zeros((4, EXPERTS)), k=1, importance_weight=1.0)
    np.testing.assert_allclose(crowded.losses["importance"], EXPERTS - 1, rtol=1e-5)


def _mixtral(row, k):
    p = np.exp(row - row.max())
    p /= p.sum()
    chosen = np.argsort(-p, kind="stable")[:k]
    return chosen, p[chosen] / p[chosen].sum()


def _olmoe(row, k):
    p = np.exp(row - row.max())
    p /= p.sum()
    chosen = np.argsort(-p, kind="stable")[:k]
    return chosen, p[chosen]


def _gpt_oss(row, k):
    chosen = np.argsort(-row, kind="stable")[:k]
    p = np.exp(row[chosen] - row[chosen].max())
    return chosen, p / p.sum()


def _deepseek_v3(row, k, bias):
    s = 1 / (1 + np.exp(-row))
    groups = (s + bias).reshape(4, 2)
    kept = np.argsort(-groups.sum(axis=1), kind="stable")[:2]
    masked = np.full((4, 2), -np.inf)
    masked[kept] = groups[kept]
    chosen = np.argsort(-masked.reshape(-1), kind="stable")[:k]
    return chosen, 2.5 * s[chosen] / s[chosen].sum()


def _deepseek_v2(row, k):
    p = np.exp(row - row.max())
    groups = (p / p.sum()).reshape(4, 2)
    masked = np.zeros((4, 2))
    for group in np.argsort(-groups.max(axis=1), kind="stable")[:2]:
        masked[group] = groups[group]
    chosen = np.argsort(-masked.reshape(-1), kind="stable")[:k]
    return chosen, 16 * masked.reshape(-1)[chosen]


BIAS = np.linspace(-0.5, 0.5, EXPERTS)
MODELS = {
    "Mixtral": (softmax_top_k, {}, _mixtral),
    "Qwen3-MoE": (softmax_top_k, {"renormalize": True}, _mixtral),
    "Qwen3-MoE, norm_topk_prob=False": (
        softmax_top_k,
        {"renormalize": False},
        _olmoe,
    ),
    "OLMoE, norm_topk_prob=True": (softmax_top_k, {"renormalize": True}, _mixtral),
    "OLMoE": (softmax_top_k, {"renormalize": False}, _olmoe),
    "gpt-oss": (top_k_softmax, {}, _gpt_oss),
    "DeepSeek-V2": (
        softmax_top_k,
        {"groups": 4, "kept_groups": 2, "scale": 16.0, "renormalize": False},
        _deepseek_v2,
    ),
    "DeepSeek-V3": (
        sigmoid_top_k,
        {"groups": 4, "kept_groups": 2, "scale": 2.5, "bias": jnp.asarray(BIAS)},
        functools.partial(_deepseek_v3, bias=BIAS),
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_router_is_that_of_the_released_model(model):
    router, arguments, oracle = MODELS[model]
    logits = logits_of(3)
    routing = router(logits, k=3, **arguments)
    for row, experts, weights in zip(np.float64(logits), *routing[:2], strict=True):
        chosen, expected = oracle(row, 3)
        np.testing.assert_array_equal(experts, chosen)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
