"""Updaters: the count is what was asked, and each moves as its paper says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.masked import CRITERIA, UPDATERS, Evidence, Rule, masks_of
from sparsejax.masked.structures import (
    Block,
    ConstantFanIn,
    NOfM,
    Slice,
    Unstructured,
)
from sparsejax.masked.tiles import Transposable
from sparsejax.tree import leaves
from tests.masked.networks import UP, network, plan, run

SHAPE = (6, 8)
STRUCTURES = [
    Unstructured(),
    NOfM(m=4, axis=1),
    Transposable(m=2),
    ConstantFanIn(),
    Block(tile=(2, 2), power=2),
    Slice(axis=1),
]
# ``static`` and ``learned`` ask for no count, ``srigl`` for one structure.
MOVING = sorted(set(UPDATERS) - {"static", "learned", "srigl"})


def evidence(seed):
    """Ties in the weights and in the gradient."""
    draw = np.random.default_rng(seed)
    w, g, *rest = (draw.integers(-3, 4, SHAPE).astype(np.float32) for _ in range(6))
    known = map(jnp.asarray, rest)
    return Evidence(jnp.asarray(w), jnp.asarray(g), jax.random.key(seed), *known)


@functools.cache
def compiled(name, structure):
    """Start with one count, update to another."""

    def update(before, keep, moved, seen):
        rule = Rule(structure, CRITERIA["magnitude"], keep, moved)
        return UPDATERS[name](start(structure, before), seen, rule)

    return jax.jit(update)


def start(structure, keep, seed=5):
    return structure(CRITERIA["random"](evidence(seed)), keep)


# Every updater with one structure, and one updater with every structure.
PAIRS = [(name, STRUCTURES[0]) for name in MOVING if name != "rigl"]
PAIRS += [("rigl", structure) for structure in STRUCTURES]


@pytest.mark.parametrize(("name", "structure"), PAIRS)
@given(seed=st.integers(0, 50), counts=st.tuples(*[st.floats(0, 1)] * 3))
def test_the_next_mask_has_the_count_asked_for(name, structure, seed, counts):
    quantum = structure.quantum(SHAPE)
    before, keep = (int(x * (48 // quantum)) * quantum for x in counts[:2])
    moved = int(counts[2] * (keep // quantum)) * quantum
    mask = compiled(name, structure)(before, keep, moved, evidence(seed))
    assert int(mask.sum()) == keep


@pytest.mark.parametrize("name", MOVING)
def test_the_count_survives_gradients_that_are_not_numbers(name):
    seen = evidence(0)._replace(gradient=jnp.full(SHAPE, jnp.nan))
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 20, 6)
    assert int(UPDATERS[name](start(STRUCTURES[0], 20), seen, rule).sum()) == 20


def test_prune_keeps_the_largest_of_the_live():
    mask, seen = start(STRUCTURES[0], 30), evidence(1)
    after = UPDATERS["prune"](
        mask, seen, Rule(STRUCTURES[0], CRITERIA["magnitude"], 12)
    )
    assert not (after & ~mask).any()
    size = np.abs(np.asarray(seen.weight))
    assert size[after].min() >= size[mask & ~after].max()


def test_select_may_bring_back_what_was_dead():
    mask, seen = jnp.zeros(SHAPE, bool), evidence(1)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 12)
    after = UPDATERS["select"](mask, seen, rule)
    np.testing.assert_array_equal(after, STRUCTURES[0](jnp.abs(seen.weight), 12))


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest():
    mask = jnp.array([[True, True, True, False, False, False]])
    weight = jnp.array([[3.0, -1.0, 2.0, 0.0, 0.0, 0.0]])
    seen = Evidence(weight, jnp.array([[9.0, 1.0, 9.0, 2.0, -5.0, 3.0]]), None)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 3, 1)
    after = UPDATERS["rigl"](mask, seen, rule)
    assert after.tolist() == [[True, False, True, False, True, False]]


def test_rigl_may_grow_again_what_it_just_dropped():
    mask = jnp.array([[True, True, False]])
    seen = Evidence(jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[0.0, 4.0, 2.0]]), None)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 2, 1)
    assert UPDATERS["rigl"](mask, seen, rule).tolist() == mask.tolist()


def test_set_grows_everywhere_in_the_end():
    mask, seen = start(STRUCTURES[0], 12), evidence(2)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 12, 6)
    grow = jax.jit(lambda key: UPDATERS["set"](mask, seen._replace(key=key), rule))
    kept = UPDATERS["prune"](mask, seen, rule._replace(keep=6))
    visits = sum(np.asarray(grow(jax.random.key(i))) for i in range(100))
    assert (visits[kept] == 100).all()
    # 42 candidates for 6 places: 14 visits each on average, 3.5 the deviation
    assert visits[~kept].min() > 0
    assert visits[~kept].max() < 14 + 5 * 3.5


def test_sparse_momentum_grows_where_momentum_is_largest():
    mask = jnp.array([[True, True, False, False]])
    weight, momentum = jnp.array([[3.0, 1.0, 0, 0]]), jnp.array([[9.0, 1.0, -3.0, 2.0]])
    seen = Evidence(weight, None, None, momentum=momentum)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 2, 1)
    after = UPDATERS["sparse_momentum"](mask, seen, rule)
    assert after.tolist() == [[True, False, True, False]]


def slow_srigl(mask, weight, slope, keep, moved, salient):
    """Neuron by neuron; rows are neurons."""
    neurons, inputs = mask.shape
    places = list(itertools.product(range(neurons), range(inputs)))
    by_size = sorted((p for p in places if mask[p]), key=lambda p: -abs(weight[p]))
    kept = set(by_size[: keep - moved])
    grown = set(sorted(places, key=lambda p: -abs(slope[p]))[:moved])
    count = [sum((i, j) in kept | grown for j in range(inputs)) for i in range(neurons)]
    least = max(int(salient * (keep // neurons)), 1) if salient else 0
    most = sorted(range(neurons), key=lambda i: -count[i])[: -(-keep // inputs)]
    active = [i for i in range(neurons) if count[i] >= least or i in most]
    after = np.zeros_like(mask)
    for i in active:
        first = sorted(
            (j for j in range(inputs) if (i, j) in kept),
            key=lambda j: -abs(weight[i, j]),
        )
        rest = sorted(
            (j for j in range(inputs) if (i, j) not in kept),
            key=lambda j: -abs(slope[i, j]),
        )
        after[i, (first + rest)[: keep // len(active)]] = True
    return after


@pytest.mark.parametrize("salient", [0.0, 0.5, 1.0])
@given(seed=st.integers(0, 50))
def test_srigl_equals_going_from_neuron_to_neuron(salient, seed):
    seen, structure = evidence(seed), ConstantFanIn(axis=1)
    mask = structure(CRITERIA["random"](seen), 24)
    after = srigl(salient)(mask, seen)
    expected = slow_srigl(*map(np.asarray, (mask, *seen[:2])), 24, 8, salient)
    np.testing.assert_array_equal(after, expected)
    rows = np.asarray(after).sum(1)
    assert len(set(rows[rows > 0])) == 1
    assert rows.sum() <= 24


@functools.cache
def srigl(salient):
    rule = Rule(ConstantFanIn(axis=1), CRITERIA["magnitude"], 24, 8)
    return jax.jit(lambda m, seen: UPDATERS["srigl"](m, seen, rule, salient=salient))


def test_srigl_gives_up_neurons_that_have_nothing_salient():
    seen = evidence(0)
    weight, slope = (x.at[3].set(0.0) for x in (seen.weight, seen.gradient))
    seen = seen._replace(weight=weight.at[:3].add(5.0), gradient=slope)
    mask = ConstantFanIn(axis=1)(jnp.ones(SHAPE), 24)
    after = np.asarray(srigl(0.5)(mask, seen))
    assert not after[3].any()
    assert after[:3].any(1).all()


def test_what_srigl_asks_of_neurons_may_differ_by_path():
    mask, seen = ConstantFanIn(axis=1)(jnp.ones(SHAPE), 24), evidence(0)
    asked = {"ffn": 0.9, "ffn/down$": 0.0}
    for path, salient in (("ffn/up", 0.9), ("ffn/down", 0.0), ("attn/out", 0.3)):
        rule = Rule(ConstantFanIn(axis=1), CRITERIA["magnitude"], 24, 8, path=path)
        after = UPDATERS["srigl"](mask, seen, rule, salient=asked)
        np.testing.assert_array_equal(after, srigl(salient)(mask, seen))
        assert salient or np.asarray(after).any(1).all()  # at 0 none is given up


def test_srigl_refuses_other_structures():
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 24, 8)
    with pytest.raises(ValueError, match="choose structure='constant_fan_in'"):
        UPDATERS["srigl"](jnp.ones(SHAPE, bool), evidence(0), rule)


def test_static_changes_nothing():
    mask = start(STRUCTURES[0], 12)
    rule = Rule(STRUCTURES[0], CRITERIA["magnitude"], 3)
    assert UPDATERS["static"](mask, evidence(0), rule) is mask


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_criteria_score_in_float32_and_are_a_function_of_the_evidence(name):
    seen = evidence(3)
    seen = seen._replace(weight=seen.weight.astype(jnp.bfloat16))
    scores = CRITERIA[name](seen)
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, CRITERIA[name](seen))


def test_criteria_are_their_formulas():
    seen = evidence(3)
    w, g = np.asarray(seen.weight), np.asarray(seen.gradient)
    np.testing.assert_array_equal(CRITERIA["saliency"](seen), np.abs(w * g))
    np.testing.assert_array_equal(CRITERIA["gradient"](seen), np.abs(g))
    np.testing.assert_array_equal(CRITERIA["magnitude"](seen), np.abs(w))
    momentum, variance, movement, curvature = map(np.asarray, seen[3:7])
    np.testing.assert_array_equal(CRITERIA["momentum"](seen), np.abs(momentum))
    np.testing.assert_array_equal(CRITERIA["fisher"](seen), w**2 * variance)
    np.testing.assert_array_equal(CRITERIA["movement"](seen), movement)
    np.testing.assert_array_equal(CRITERIA["grasp"](seen), w * curvature)


@pytest.mark.parametrize("name", ["gradient", "saliency"])
def test_a_criterion_says_when_it_has_no_gradient(name):
    with pytest.raises(ValueError, match="no gradient before the first step"):
        CRITERIA[name](evidence(0)._replace(gradient=None))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("momentum", "momentum"),
        ("fisher", "variance"),
        ("movement", "movement"),
        ("grasp", "curvature"),
    ],
)
def test_a_criterion_says_what_it_does_not_know(name, field):
    with pytest.raises(ValueError, match=f"{field}=None: .*choose"):
        CRITERIA[name](evidence(0)._replace(**{field: None}))


@pytest.mark.parametrize(("updater", "steps"), [("rigl", 2), ("set", 4)])
def test_a_mask_update_leaves_the_turns_of_accumulated_gradients(updater, steps):
    rate = optax.scale_by_schedule(lambda count: -1e-2 / (1 + count))
    tx = optax.MultiSteps(optax.chain(optax.scale_by_adam(), rate), 2)
    config = plan(updater=updater, schedule="constant", begin=1, end=7, every=3)
    history = run(tx.gradient_transformation(), config, network(jax.random.key(3)), 8)
    inner = [state.inner for _, state in history]
    # masks change in the steps 1, 4 and 7; in 1 and 7 it is the turn of the optimiser
    assert [int(x.mini_step) for x in inner] == [0, 1] * 4 + [0]
    assert [int(x.gradient_step) for x in inner] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    adam, schedule = inner[-1].inner_opt_state
    assert (int(adam.count), int(schedule.count)) == (steps, 4)
    live = np.asarray(masks_of(history[5][1])[UP][...])
    summed = np.asarray(leaves(inner[5].acc_grads)[UP])
    assert summed[live].any()
    assert not summed[~live].any()
