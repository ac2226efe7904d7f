"""Laws: what they become at their ends, and that one of them holds all the others."""

import math

import numpy as np
import pytest

from sparsejax.scaling import LAWS
from sparsejax.scaling.frontier import effective_size, routing_cutoff, size_multiplier
from sparsejax.scaling.laws import saturated

RANDOM = np.random.default_rng(0)
ROWS = 12
ONES = np.ones(ROWS)
COLUMNS = {
    "parameters": RANDOM.uniform(1e6, 1e9, ROWS),
    "average": RANDOM.uniform(1e6, 1e9, ROWS),
    "tokens": RANDOM.uniform(1e8, 1e11, ROWS),
    "experts": RANDOM.integers(1, 512, ROWS).astype(float),
    "granularity": 2.0 ** RANDOM.integers(0, 6, ROWS),
    "density": RANDOM.uniform(0.1, 1, ROWS),
    "length": RANDOM.uniform(1e3, 1e5, ROWS),
}
COEFFICIENTS = {
    "chinchilla": {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37},
    "average_parameters": {
        "E": 1.8,
        "A": 480.0,
        "alpha": 0.35,
        "B": 2100.0,
        "beta": 0.37,
    },
    "kaplan": {"N_c": 6.4e13, "alpha_N": 0.076, "D_c": 1.8e13, "alpha_D": 0.103},
    "routed": {
        "a": -0.083,
        "b": -0.118,
        "c": 0.0099,
        "d": 1.1136,
        "E_start": 2.075,
        "E_max": 238.7,
    },
    "fine_grained": {
        "c": 0.47,
        "g": 2.1,
        "gamma": 0.58,
        "a": 18.1,
        "alpha": 0.115,
        "b": 30.8,
        "beta": 0.147,
    },
    "sparsely_connected": {
        "a_S": 16.8,
        "b_S": 0.722,
        "c_S": 45.0,
        "b_N": 0.245,
        "a_D": 6.9e8,
        "b_D": 0.203,
        "c": 0.651,
    },
    "sparse_attention": {"a": -0.1, "b": 0.2, "c": 0.05, "d": 1.5},
}
# The joint law with nothing but a floor: each reduction says what it has besides.
PLAIN = {
    **dict.fromkeys(LAWS["joint"].starts, 0.0),
    "A": 1.0,
    "shape": 1.0,
    "first": 1.0,
}


def as_additive(c, p):
    return c, {"active": p["parameters"]}


def as_kaplan(c, p):
    d = c["alpha_D"]
    size = {"A": c["N_c"] ** c["alpha_N"], "alpha": c["alpha_N"], "shape": d}
    return {**size, "B": c["D_c"] ** d, "beta": d}, {"active": p["parameters"]}


def as_routed(c, p):
    found = {
        "A": 10 ** c["d"],
        "alpha": -c["a"],
        "routing": -c["b"],
        "mixed": c["c"] / np.log(10),
        "first": c["E_start"],
        "last_inverse": 1 / c["E_max"],
    }
    n = p["parameters"]
    return found, {"active": n, "total": n * p["experts"]}


def as_fine_grained(c, p):
    same = {"alpha": c["alpha"], "B": c["b"], "beta": c["beta"], "gamma": c["gamma"]}
    total = {"routing": c["alpha"]}  # N counts everything: routing is worth as much
    worth = {"E": c["c"], "A": c["a"], "fine": c["g"] / c["a"]}
    point = {"active": p["parameters"] / 7, "total": p["parameters"]}
    return {**same, **total, **worth}, {**point, "granularity": p["granularity"]}


def as_sparsely_connected(c, p):
    worth = {"A": c["c_S"], "masked": c["a_S"] / c["c_S"], "mu": c["b_S"]}
    data = {"B": c["a_D"] ** c["b_D"], "beta": c["b_D"], "E": c["c"]}
    point = {"active": p["parameters"], "density": p["density"]}
    return {**worth, **data, "alpha": c["b_N"]}, point


def as_average(c, p):
    return c, {"active": p["average"]}


def as_attention(c, p):
    found = {"A": c["d"], "alpha": -c["a"], "context": c["b"], "reading": -c["c"]}
    seen = {"length": p["length"], "attention": p["density"]}
    return found, {"active": p["parameters"], **seen}


REDUCTIONS = {
    "chinchilla": as_additive,
    "kaplan": as_kaplan,
    "routed": as_routed,
    "fine_grained": as_fine_grained,
    "sparsely_connected": as_sparsely_connected,
    "average_parameters": as_average,
    "sparse_attention": as_attention,
}


@pytest.mark.parametrize("name", sorted(set(LAWS) - {"joint"}))
def test_the_joint_law_reduces_to_each_of_the_others(name):
    coefficients, point = REDUCTIONS[name](COEFFICIENTS[name], COLUMNS)
    point = {
        **dict.fromkeys(LAWS["joint"].variables, ONES),
        "tokens": COLUMNS["tokens"],
        "total": point["active"],
        **point,
    }
    expected = LAWS[name](COEFFICIENTS[name], COLUMNS)
    found = LAWS["joint"]({**PLAIN, **coefficients}, point)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


# Each law once more, one row at a time, in plain Python.
def slow_additive(c, n, d):
    return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]


def slow_kaplan(c, p):
    size = (c["N_c"] / p["parameters"]) ** (c["alpha_N"] / c["alpha_D"])
    return (size + c["D_c"] / p["tokens"]) ** c["alpha_D"]


def slow_routed(c, p):
    start = 1 / (1 / c["E_start"] - 1 / c["E_max"])
    e = math.log10(1 / (1 / (p["experts"] - 1 + start) + 1 / c["E_max"]))
    n = math.log10(p["parameters"])
    return 10 ** (c["a"] * n + c["b"] * e + c["c"] * n * e + c["d"])


def slow_fine_grained(c, p):
    worth = c["g"] / p["granularity"] ** c["gamma"] + c["a"]
    size = worth / p["parameters"] ** c["alpha"]
    return c["c"] + size + c["b"] / p["tokens"] ** c["beta"]


def slow_sparsely_connected(c, p):
    worth = c["a_S"] * p["density"] ** c["b_S"] + c["c_S"]
    data = (c["a_D"] / p["tokens"]) ** c["b_D"]
    return worth / p["parameters"] ** c["b_N"] + data + c["c"]


def slow_attention(c, p):
    logs = c["a"] * math.log(p["parameters"]) + c["b"] * math.log(p["length"])
    return math.exp(math.log(c["d"]) + logs - c["c"] * math.log(p["density"]))


SLOW = {
    "chinchilla": lambda c, p: slow_additive(c, p["parameters"], p["tokens"]),
    "average_parameters": lambda c, p: slow_additive(c, p["average"], p["tokens"]),
    "kaplan": slow_kaplan,
    "routed": slow_routed,
    "fine_grained": slow_fine_grained,
    "sparsely_connected": slow_sparsely_connected,
    "sparse_attention": slow_attention,
}


@pytest.mark.parametrize("name", sorted(set(LAWS) - {"joint"}))
def test_a_law_agrees_with_its_formula_written_out(name):
    found = LAWS[name](COEFFICIENTS[name], COLUMNS)
    for row in range(ROWS):
        point = {k: float(x[row]) for k, x in COLUMNS.items()}
        assert found[row] == pytest.approx(SLOW[name](COEFFICIENTS[name], point))


def test_saturated_counts_one_expert_as_the_first_and_many_as_the_last():
    assert saturated(1, 2.0, 1 / 300) == pytest.approx(2, rel=1e-12)
    assert saturated(1e12, 2.0, 1 / 300) == pytest.approx(300, rel=1e-6)
    assert saturated(64, 1.0, 0.0) == pytest.approx(64)
    c = COEFFICIENTS["routed"]
    one = LAWS["routed"](c, {"parameters": 1e8, "experts": 1})
    e = math.log10(c["E_start"])
    expected = 10 ** (c["a"] * 8 + c["b"] * e + c["c"] * 8 * e + c["d"])
    assert one == pytest.approx(expected, rel=1e-12)


def test_effective_size_is_that_of_the_dense_model_with_equal_loss():
    c, law = COEFFICIENTS["routed"], LAWS["routed"]
    size = effective_size(c, parameters=1e8, experts=64)
    routed = law(c, {"parameters": 1e8, "experts": 64})
    assert law(c, {"parameters": size, "experts": 1}) == pytest.approx(routed)
    assert effective_size(c, parameters=1e8, experts=1) == pytest.approx(1e8)


def test_routing_cutoff_is_where_experts_stop_helping():
    c = COEFFICIENTS["routed"]
    at = np.full(3, routing_cutoff(c))
    losses = LAWS["routed"](c, {"parameters": at, "experts": np.array([1, 8, 256])})
    np.testing.assert_allclose(losses, losses[0], rtol=1e-12)


def test_size_multiplier_is_that_of_the_dense_model_with_equal_loss():
    c, law = COEFFICIENTS["sparsely_connected"], LAWS["sparsely_connected"]
    times = size_multiplier(c, 0.25)
    masked = law(c, {"parameters": 1e8, "tokens": 1e10, "density": 0.25})
    dense = law(c, {"parameters": 1e8 * times, "tokens": 1e10, "density": 1.0})
    assert dense == pytest.approx(masked)
    falling = size_multiplier(c, np.array([0.1, 0.5, 1.0]))
    assert falling[0] > falling[1] > falling[2] == pytest.approx(1)


def test_finer_experts_help_less_and_less():
    c, law = COEFFICIENTS["fine_grained"], LAWS["fine_grained"]
    point = {"parameters": 1e9, "tokens": 1e10}
    losses = law(c, {**point, "granularity": 2.0 ** np.arange(40)})
    assert (np.diff(losses) < 0).all()
    assert (np.diff(losses, 2) > 0).all()
    limit = c["c"] + c["a"] / 1e9 ** c["alpha"] + c["b"] / 1e10 ** c["beta"]
    assert losses[-1] == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize(
    ("coefficients", "point", "message"),
    [
        ({"E": 1.0}, {"parameters": 1, "tokens": 1}, "no coefficient 'A': this law"),
        (COEFFICIENTS["chinchilla"], {"parameters": 1}, "no column 'tokens': this law"),
    ],
)
def test_a_law_names_what_it_was_not_given(coefficients, point, message):
    with pytest.raises(ValueError, match=message):
        LAWS["chinchilla"](coefficients, point)
