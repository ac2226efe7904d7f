"""Dispatch: any router through any dispatcher is a loop over tokens and experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.moe import (
    DISPATCHERS,
    ROUTERS,
    GatedExperts,
    Routing,
    apply_experts,
    capacity_of,
    dispatch,
    limited,
    order,
)
from sparsejax.moe import experts as experts_module
from sparsejax.moe.routers import MOST, top_k
from tests.moe.routed import BATCH, EXPERTS, TOKENS, choices, compiled, padded, route

WIDTH, HIDDEN = 8, 10
FAST = [name for name in sorted(DISPATCHERS) if name != "dense"]


@functools.cache
def problem(seed=0, experts=EXPERTS):
    keys = jax.random.split(jax.random.key(seed), 5)
    normal = jax.random.normal
    weights = GatedExperts(
        normal(keys[0], (experts, WIDTH, HIDDEN)) * WIDTH**-0.5,
        normal(keys[1], (experts, WIDTH, HIDDEN)) * WIDTH**-0.5,
        normal(keys[2], (experts, HIDDEN, WIDTH)) * HIDDEN**-0.5,
    )
    router = normal(keys[3], (WIDTH, experts))
    return normal(keys[4], (TOKENS, WIDTH)), router, weights


jitted = jax.jit(
    apply_experts, static_argnames=("dispatcher", "activation", "capacity")
)
limit = jax.jit(limited, static_argnums=1)
softmax_top_k = compiled(top_k.softmax_top_k)
top_k_softmax = compiled(top_k.top_k_softmax)


def apply(name, x, routing, experts, **settings):
    if name == "capacity":
        settings.setdefault("capacity", x.shape[0])
    return jitted(x, routing, experts, dispatcher=name, **settings)


def looped(x, routing, experts):
    """One token and one choice at a time, in float64."""
    x, gate, up, down = (np.float64(a) for a in (x, *experts[:3]))
    y = np.zeros_like(x)
    for n, k in np.ndindex(*routing.experts.shape):
        e, weight = int(routing.experts[n, k]), float(routing.weights[n, k])
        if weight:
            g = x[n] @ gate[e]
            y[n] += weight * ((g / (1 + np.exp(-g)) * (x[n] @ up[e])) @ down[e])
    return y


@functools.cache
def routed(name):
    """A router's choice as two slots a token, or as many as it needs."""
    x, logits_weight, _ = problem()
    return padded(route(name, x @ logits_weight), 2)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(dispatcher, x, routing, experts):
    """Of any routing: only the number of its slots makes another program."""

    def total(x, weights, experts):
        y = apply(dispatcher, x, routing._replace(weights=weights), experts)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    grad = jax.grad(total, (0, 1, 2), has_aux=True)
    return grad(x, routing.weights, experts)


@functools.cache
def value_and_gradients(dispatcher, router):
    x, _, experts = problem()
    return _value_and_gradients(dispatcher, x, routed(router), experts)


def assert_close(a, b, tolerance=2e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_dense_is_the_loop_over_tokens_and_choices(router):
    x, _, experts = problem()
    routing = routed(router)
    y = apply("dense", x, routing, experts)
    np.testing.assert_allclose(y, looped(x, routing, experts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatcher", FAST)
def test_curvature_is_that_of_the_dense_oracle(dispatcher):
    x, _, experts = problem()

    @functools.partial(jax.jit, static_argnums=0)
    def curved(dispatcher, x):
        def total(x):
            return jnp.sin(apply(dispatcher, x, routed("softmax_top_k"), experts)).sum()

        return jax.jvp(jax.grad(total), (x,), (jnp.cos(x),))[1]

    assert_close(curved(dispatcher, x), curved("dense", x), 1e-4)


@pytest.mark.parametrize("dispatcher", FAST)
@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_pair_equals_the_dense_oracle_in_values_and_gradients(router, dispatcher):
    fast, slow = (value_and_gradients(d, router) for d in (dispatcher, "dense"))
    assert_close(fast, slow)


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_equal_experts_with_weights_of_one_are_a_dense_layer(name):
    x, logits_weight, experts = problem()
    same = jax.tree.map(lambda w: jnp.tile(w[:1], (EXPERTS, 1, 1)), experts)
    y = apply(name, x, softmax_top_k(x @ logits_weight, k=EXPERTS), same)
    gate, up, down = (w[0] for w in experts[:3])
    assert_close(y, (jax.nn.silu(x @ gate) * (x @ up)) @ down)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_one_expert_is_a_dense_layer_with_its_gradients(name):
    x, logits_weight, experts = problem(experts=1)

    def sparse(experts):
        routing = softmax_top_k(x @ logits_weight, k=1)
        return jnp.square(apply(name, x, routing, experts)).sum()

    def dense(experts):
        gate, up, down = (w[0] for w in experts[:3])
        return jnp.square((jax.nn.silu(x @ gate) * (x @ up)) @ down).sum()

    assert_close(jax.grad(sparse)(experts), jax.grad(dense)(experts), 1e-4)


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_the_order_of_experts_does_not_matter(name):
    x, logits_weight, experts = problem()
    order = jax.random.permutation(jax.random.key(1), EXPERTS)
    moved = jax.tree.map(lambda w: w[order], experts)
    a = apply(name, x, softmax_top_k(x @ logits_weight, k=2), experts)
    b = apply(name, x, softmax_top_k(x @ logits_weight[:, order], k=2), moved)
    assert_close(a, b)


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_the_order_of_tokens_commutes(name):
    x, logits_weight, experts = problem()
    order = jax.random.permutation(jax.random.key(1), TOKENS)
    a = apply(name, x, softmax_top_k(x @ logits_weight, k=2), experts)
    b = apply(name, x[order], softmax_top_k(x[order] @ logits_weight, k=2), experts)
    assert_close(a[order], b)


@pytest.mark.few(1)
@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu"])
def test_activations_agree_between_dispatchers(activation):
    x, logits_weight, experts = problem()
    routing = softmax_top_k(x @ logits_weight, k=2)
    slow, *fast = (
        apply(name, x, routing, experts, activation=activation)
        for name in ("dense", *FAST)
    )
    for y in fast:
        assert_close(y, slow)


@pytest.mark.parametrize("name", FAST)
def test_unused_slots_and_unvisited_experts_may_hold_anything(name):
    """Poison an expert nobody visits, and tokens whose slots are all unused."""
    x, logits_weight, experts = problem()
    routing = softmax_top_k(x @ logits_weight.at[:, 3:].set(-100.0), k=2)
    chosen = jnp.where(routing.experts == 3, 2, routing.experts)
    weights = routing.weights.at[-9:].set(0)
    routing = routing._replace(experts=chosen, weights=weights)

    def run(x, experts, weights):
        y = apply(name, x, routing._replace(weights=weights), experts)
        return jnp.square(y).sum(), y

    poison = jax.tree.map(lambda w: w.at[3].set(jnp.nan), experts)
    grad = jax.grad(run, (0, 1, 2), has_aux=True)
    (dx, dw, dweights), y = grad(x.at[-9:].set(jnp.nan), poison, weights)
    clean, y_clean = grad(x, experts, weights)
    if name == "capacity":  # buffers multiply all experts, by zero rows: keep weights
        (dx, dw, dweights), y = grad(x.at[-9:].set(jnp.nan), experts, weights)
    assert_close((dx, dw, dweights, y), (*clean, y_clean))
    assert not dx[-9:].any()
    assert not dweights[-9:].any()
    assert not any(w[3].any() for w in jax.tree.leaves(dw))


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_no_slot_used_gives_zero(name):
    x, logits_weight, experts = problem()
    routing = softmax_top_k(x @ logits_weight, k=2)
    routing = routing._replace(weights=jnp.zeros_like(routing.weights))
    assert not apply(name, x, routing, experts).any()


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_one_token_is_enough(name):
    x, logits_weight, experts = problem()
    routing = softmax_top_k(x[:1] @ logits_weight, k=2)
    y = apply(name, x[:1], routing, experts)
    np.testing.assert_allclose(y, looped(x[:1], routing, experts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
def test_bfloat16_stays_near_the_exact_answer(name):
    x, logits_weight, experts = problem()
    routing = top_k_softmax(x @ logits_weight, k=2)
    low = [jax.tree.map(lambda a: a.astype(jnp.bfloat16), t) for t in (x, experts)]
    y = apply(name, low[0], routing, low[1])
    assert y.dtype == jnp.bfloat16
    exact = looped(*(low[0].astype(jnp.float32), routing, low[1]))
    dense = apply("dense", low[0], routing, low[1])
    error, allowed = (
        np.abs(np.float64(a.astype(jnp.float32)) - exact).max() for a in (y, dense)
    )
    assert error <= 2 * allowed


def test_weights_are_cast_to_the_tokens():
    x, logits_weight, experts = problem()
    routing = softmax_top_k(x @ logits_weight, k=2)
    y = apply("grouped", x.astype(jnp.bfloat16), routing, experts)
    assert y.dtype == jnp.bfloat16


def test_sorting_pairs_equals_sorting_packed_keys(monkeypatch):
    chosen = jax.random.randint(jax.random.key(0), (TOKENS, 3), 0, EXPERTS + 1)
    packed = order.sort(chosen, EXPERTS)
    monkeypatch.setattr(order, "PACKED", 0)
    for a, b in zip(packed, order.sort(chosen, EXPERTS), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_of_moving_rows_is_a_gather_too():
    x, chosen = problem()[0], routed("top_k_softmax").experts
    sorted_ = order.sort(chosen, EXPERTS)
    source, uses = sorted_.slots % TOKENS, sorted_.places.reshape(chosen.T.shape)

    def total(x, take):
        return (take(x) * jnp.arange(chosen.size, dtype=x.dtype)[:, None]).sum()

    ours = jax.grad(
        functools.partial(total, take=lambda x: order.take(x, source, uses))
    )
    theirs = jax.grad(functools.partial(total, take=lambda x: x[source]))
    np.testing.assert_allclose(ours(x), theirs(x))
    assert "scatter" not in str(jax.make_jaxpr(ours)(x))
    assert "scatter" in str(jax.make_jaxpr(theirs)(x))


def crowded():
    """Everyone wants expert 0 first; second choices go round."""
    second = 1 + jnp.arange(TOKENS) % (EXPERTS - 1)
    chosen = jnp.stack([jnp.zeros_like(second), second], axis=1).astype(jnp.int32)
    weights = 0.5 + jax.random.uniform(jax.random.key(0), chosen.shape)
    return Routing(chosen, weights, jnp.full((TOKENS, EXPERTS), 1 / EXPERTS), {})


@pytest.mark.few(2)
@pytest.mark.parametrize("capacity", [1, 7, TOKENS])
def test_by_capacity_drops_what_limited_drops(capacity):
    x, _, experts = problem()

    def total(routing_of, name, weights, **settings):
        routing = routing_of(crowded()._replace(weights=weights))
        return jnp.square(apply(name, x, routing, experts, **settings)).sum()

    weights = crowded().weights
    value_and_grad = jax.value_and_grad(total, 2)
    a = value_and_grad(lambda r: r, "capacity", weights, capacity=capacity)
    b = value_and_grad(lambda r: limit(r, capacity), "dense", weights)
    assert_close(a, b, 1e-4)


def test_by_group_drops_nothing_however_crowded_an_expert_is():
    x, _, experts = problem()
    routing = crowded()
    found = apply("grouped", x, routing, experts)
    np.testing.assert_allclose(found, looped(x, routing, experts), rtol=1e-4, atol=1e-5)
    assert (jnp.abs(found).sum(axis=1) > 0).all()


@pytest.mark.parametrize("name", MOST)
def test_few_visits_of_many_slots_are_few_rows(name, monkeypatch):
    x, weight, experts = problem()
    routing, seen = route(name, x @ weight), []
    most = MOST[name](TOKENS, BATCH, EXPERTS, choices(name))

    def products(rows, *rest, **settings):
        seen.append(len(rows))
        return experts_module.grouped(rows, *rest, **settings)

    monkeypatch.setattr(dispatch, "grouped", products)
    chosen = jnp.where(routing.weights != 0, routing.experts, EXPERTS)
    run = functools.partial(dispatch.by_group, activation=experts_module.HIDDEN["silu"])

    def total(x, weights, experts, **limit):
        return jnp.square(run(x, chosen, weights, experts, **limit)).sum()

    step = jax.jit(jax.value_and_grad(total, (0, 1, 2)), static_argnames="most")
    given = x, routing.weights, experts
    assert_close(step(*given), step(*given, most=most), 1e-4)
    assert seen == [TOKENS * EXPERTS, most * EXPERTS]
    assert most * EXPERTS < TOKENS * EXPERTS / 2


def test_a_dropped_token_gets_nothing():
    x, _, experts = problem()
    routing = crowded()
    alone = Routing(routing.experts[:, :1], routing.weights[:, :1], routing.probs, {})
    y = apply("capacity", x, alone, experts, capacity=3)
    assert y[:3].any(axis=1).all()
    assert not y[3:].any()


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, 27), (1.1, 30), (1.25, 34), (9.0, 80), (1e-6, 1)]
)
def test_capacity_is_counted_in_integers(factor, expected):
    rows = capacity_of(tokens=80, experts=6, per_token=2, factor=factor)
    assert rows == expected


def test_capacity_is_not_moved_by_binary_fractions():
    assert capacity_of(tokens=1000, experts=10, per_token=1, factor=1.1) == 110


def test_capacity_below_one_is_refused():
    with pytest.raises(ValueError, match=r"factor=0\.0: a capacity below one row"):
        capacity_of(tokens=8, experts=2, per_token=1, factor=0.0)
    with pytest.raises(ValueError, match="capacity=0: must be at least one row"):
        limited(crowded(), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dispatcher": "grupped"}, "dispatcher='grupped'.*did you mean 'grouped'"),
        ({"activation": "selu"}, "activation='selu'.*did you mean 'silu'"),
        ({"dispatcher": "capacity"}, "capacity=None: .*rows of a buffer"),
        ({"dispatcher": "grouped", "capacity": 3}, "'grouped' has no buffers"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    x, _, experts = problem()
    with pytest.raises(ValueError, match=message):
        apply_experts(x, crowded(), experts, **settings)


def test_a_routing_of_other_sizes_is_refused():
    x, _, experts = problem()
    one = {"losses": {}, "probs": jnp.full((TOKENS, EXPERTS), 1 / EXPERTS)}
    ids, weights = jnp.zeros((TOKENS, 2), jnp.int32), jnp.ones((TOKENS, 3))
    with pytest.raises(ValueError, match=r"ids of shape .* and weights of shape"):
        apply_experts(x, Routing(ids, weights, **one), experts)
    with pytest.raises(ValueError, match=rf"for {TOKENS - 1} tokens"):
        apply_experts(x[1:], Routing(ids, weights[:, :2], **one), experts)
    fewer = jax.tree.map(lambda w: w[:2], experts)
    with pytest.raises(ValueError, match=f"over {EXPERTS} experts, and weights of 2"):
        apply_experts(x, Routing(ids, weights[:, :2], **one), fewer)
