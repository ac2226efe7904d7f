"""Exchanges: experts on 2, 4 and 8 devices answer as one device would."""

import jax.numpy as jnp
import pytest

from sparsejax.config import FieldError
from sparsejax.moe import DISPATCHERS, EXCHANGES, MoEConfig
from sparsejax.moe.exchange import Exchange
from sparsejax.moe.routers import MOST
from tests.moe.exchange_programs import (
    BATCH,
    EXPERTS,
    LENGTH,
    MESHES,
    NARROW,
    TOKENS,
    WIDE,
    assert_close,
    oracle,
    problem,
    program,
    routed,
)

# Experts on two devices, each expert's width on two, each sequence on two.
ALSO = (1, 1, 2, 2, 2)
WAYS = [("ring", 1), *((name, n) for name in sorted(EXCHANGES) for n in (2, 4, 8))]


def hard_cases():
    """Routings at the edges; the mesh cuts the tokens in order."""
    plain = routed("top_k_softmax")
    chosen, weights = plain.experts, plain.weights
    last = jnp.full_like(chosen, EXPERTS - 1)
    device = (jnp.arange(TOKENS) < TOKENS // 8)[:, None]
    return {
        "all tokens to the last expert": (last, weights.at[:, 1].set(0)),
        "one expert twice": (last.at[:, :].set(chosen[:, :1]), weights),
        "every other slot skipped": (chosen, weights.at[::2, 0].set(0)),
        "no token on the first device": (chosen, jnp.where(device, 0, weights)),
        "tokens on the first device only": (chosen, jnp.where(device, weights, 0)),
        "no token at all": (chosen, jnp.zeros_like(weights)),
    }


@pytest.mark.few(4)
@pytest.mark.parametrize("dispatcher", sorted(DISPATCHERS))
@pytest.mark.parametrize("routers", ["narrow", "wide"])
@pytest.mark.parametrize(("exchange", "devices"), WAYS)
def test_every_router_equals_the_dense_oracle_on_any_number_of_devices(
    exchange, devices, routers, dispatcher
):
    x, _, experts = problem()
    limit = {"capacity_factor": 100.0} if dispatcher == "capacity" else {}
    for router in NARROW if routers == "narrow" else sorted(WIDE):
        bound = {"router": router} if router in MOST else {}
        run = program(exchange, MESHES[devices], dispatcher, **limit, **bound)
        found = run(x, routed(router), experts)
        assert_close(found, oracle(x, routed(router), experts))


@pytest.mark.parametrize("case", sorted(hard_cases()))
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_hard_routings_equal_the_oracle(exchange, case):
    x, _, experts = problem()
    chosen, weights = hard_cases()[case]
    routing = routed("top_k_softmax")._replace(experts=chosen, weights=weights)
    for devices in (4, 8):
        found = program(exchange, MESHES[devices])(x, routing, experts)
        assert_close(found, oracle(x, routing, experts))


@pytest.mark.few(1)
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_tokens_that_visit_nobody_may_hold_anything(exchange):
    x, _, experts = problem()
    plain = routed("top_k_softmax")
    dead = (jnp.arange(TOKENS) % 5 == 0)[:, None]
    routing = plain._replace(weights=jnp.where(dead, 0, plain.weights))
    poisoned = jnp.where(dead.reshape(BATCH, LENGTH, 1), jnp.nan, x)
    clean, dirty = (
        program(exchange, MESHES[4], "grouped")(x, routing, experts)
        for x in (x, poisoned)
    )
    assert_close(dirty, clean)
    assert not dirty[0].reshape(TOKENS, -1)[dead[:, 0]].any()
    assert not dirty[1][0].reshape(TOKENS, -1)[dead[:, 0]].any()


@pytest.mark.few(1)
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_other_mesh_axes_change_nothing(exchange):
    x, _, experts = problem()
    routing = routed("top_k_softmax")
    found = program(exchange, ALSO)(x, routing, experts)
    assert_close(found, oracle(x, routing, experts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "rign"}, "exchange='rign'.*did you mean 'ring'"),
        ({"priority": "scores"}, "priority='scores'.*did you mean 'score'"),
        ({"rows": 3}, "rows=3: exchange 'ring' has no such limit; drop with limited"),
        ({"name": "all_to_all", "rows": 0}, "rows=0: must be at least one row"),
        ({"name": "ragged_all_to_all", "capacity": 2}, "capacity=2: .* no such limit"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Exchange(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exchange": "all2all"}, "exchange='all2all'"),
        ({"exchange_factor": 1.5}, "exchange_factor=1.5: exchange='ring' has no buff"),
        (
            {"exchange": "all_to_all", "exchange_factor": 0.0},
            "exchange_factor=0.0: must be positive",
        ),
        ({"capacity_rounding": "even"}, "capacity_rounding='even'"),
        ({"capacity_priority": "weight"}, "capacity_priority='weight'"),
    ],
    ids=str,
)
def test_a_config_names_what_an_exchange_cannot_do(settings, message):
    with pytest.raises(FieldError, match=message):
        MoEConfig(experts=EXPERTS, per_token=2, hidden=4, **settings)
