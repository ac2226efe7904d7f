"""Published methods: each config is a plan that fits, and does what is said of it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs.masked import METHODS
from sparsejax import tree
from sparsejax.config import ConfigError, convert, read
from sparsejax.data import Batch
from sparsejax.masked import (
    GROWING,
    UPDATERS,
    Blocked,
    Mask,
    effective,
    masks_of,
    measure,
    metrics,
    sparse,
    tracked_of,
)
from sparsejax.masked.kept import clock, rewound
from sparsejax.train.config import Config
from sparsejax.train.step import Step
from tests.masked.networks import PLANS, plan

FILE = Path(__file__).parents[2] / "configs" / "masked.py"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_a_config_whose_plan_fits_the_model(name):
    config = convert(Config, read(f"{FILE}:{name}"))
    step = Step(config, 260, np.ones(260, np.int32))
    rows = [jax.ShapeDtypeStruct((8, 257), "int32")] * 3
    state = jax.eval_shape(step.init, jax.random.key(0), Batch(*rows))
    masks = masks_of(state.opt)
    assert masks
    assert all(m.shape == tree.leaves(state.params)[p].shape for p, m in masks.items())
    used = jax.eval_shape(lambda s: effective(s.params, s.opt, config.masked), state)
    whole = lambda x: isinstance(x, Blocked)  # noqa: E731
    same = jax.tree.map(
        lambda x, y: x.shape == y.shape, used, state.params, is_leaf=whole
    )
    assert all(jax.tree.leaves(same))


def test_a_method_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"method='rigll'.*did you mean 'rigl'"):
        read(f"{FILE}:rigll")


PARAMS = {"a": (8, 16), "b": (16, 8)}


def params():
    keys = jax.random.split(jax.random.key(1))
    drawn = zip(PARAMS.items(), keys, strict=True)
    return {p: jax.random.normal(k, shape) / 4 for (p, shape), k in drawn}


def loss(p, x):
    return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - jnp.roll(x, 1, axis=1)) ** 2)


def batch(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(2), step), (64, 8))


def run(config, steps, tx=None, measured=None, p=None):
    """Train two matrices; give parameters and state after every step."""
    tx = sparse(tx or optax.adamw(1e-2), config, measured=measured)

    @jax.jit
    def step(p, state, x):
        value = lambda p: loss(effective(p, state, config), x)  # noqa: E731
        updates, state = tx.update(jax.grad(value)(p), state, p)
        return optax.apply_updates(p, updates), state

    p = params() if p is None else p
    history = [(p, tx.init(p))]
    for index in range(steps):
        history.append(step(*history[-1], batch(index)))
    return history


def masks(state):
    return {p: np.asarray(m[...]) for p, m in masks_of(state).items()}


def live(state):
    return {p: int(m.sum()) for p, m in masks(state).items()}


def test_a_global_ranking_keeps_the_largest_of_all_layers():
    config = plan(allocation="global", schedule="one_shot", begin=2, end=2)
    _, state = run(config, 3, optax.sgd(0.1))[-1]
    # before the weights were masked they were those of plain SGD
    before = params()
    for index in range(3):
        slopes = jax.grad(loss)(before, batch(index))
        before = jax.tree.map(lambda w, g: w - 0.1 * g, before, slopes)
    sizes = np.concatenate([np.abs(before[x]).ravel() for x in "ab"])
    least = np.sort(sizes)[-64]
    for name, mask in masks(state).items():
        np.testing.assert_array_equal(mask, np.abs(before[name]) >= least)
    assert sum(live(state).values()) == 64


@functools.cache
def shared():
    config = plan(
        updater="sparse_momentum",
        allocation="momentum",
        schedule="constant",
        moved=0.5,
        track=True,
    )
    return run(config, 10)


def test_redistribution_keeps_the_sum_and_moves_it_between_layers():
    counts = [live(state) for _, state in shared()]
    assert {sum(c.values()) for c in counts} == {64}
    assert len({c["a"] for c in counts}) > 1


def test_redistribution_follows_the_mean_momentum_of_the_layers():
    (_, before), (_, after) = shared()[2:4]
    fraction = 0.5 / 2 * (1 + np.cos(np.pi * 2 / 8))
    stay = {p: n - int(fraction * n) for p, n in live(before).items()}
    grown = 64 - sum(stay.values())
    momentum = after.kept["momentum"]
    mean = {p: np.abs(momentum[p][...])[m].mean() for p, m in masks(before).items()}
    for path, count in live(after).items():
        due = stay[path] + grown * mean[path] / sum(mean.values())
        assert abs(count - due) < 1


def test_exploration_and_overlap_follow_the_masks():
    seen = [masks(state) for _, state in shared()]
    state = shared()[-1][1]
    found = metrics(masks_of(state), **tracked_of(state))
    ever = {p: np.any([m[p] for m in seen], axis=0) for p in PARAMS}
    total = sum(x.sum() for x in ever.values()) / 256
    assert float(found["masked/explored"]) == pytest.approx(total)
    same = sum((seen[0][p] & seen[-1][p]).sum() for p in PARAMS) / 64
    assert float(found["masked/overlap"]) == pytest.approx(same)


def test_rewinding_goes_back_to_early_weights_under_the_next_mask():
    config = plan(density=0.64, schedule="geometric", begin=4, end=8, every=4, rewind=1)
    history = run(config, 10)
    early, moments = history[1][0], history[1][1].inner
    for index in (5, 9):
        p, state = history[index]
        for path, mask in masks(state).items():
            # an update goes back to within the rounding of its addition
            expected = np.where(mask, early[path], 0)
            np.testing.assert_allclose(p[path], expected, rtol=0, atol=1e-7)
            old = np.where(mask, moments[0].mu[path], 0)
            np.testing.assert_array_equal(state.inner[0].mu[path], old)
        assert int(state.inner[0].count) == 1
    assert live(history[9][1]) == {"a": 82, "b": 82}
    counts = [int(state.inner[0].count) for _, state in history[:10]]
    assert counts == [int(clock(jnp.int32(i), config)) for i in range(10)]


def test_structure_decay_trains_all_weights_under_the_groups_of_each_frame():
    groups = {"m": 2, "frames": 3}
    changes = {"density": 0.5, "structure_arguments": groups, "begin": 0, "end": 6}
    config = dataclasses.replace(PLANS["coarse_to_fine"], **changes)
    sizes = [8, 8, 8, 4, 4, 2, 2, 2]  # of groups, before the first step and after each
    for (p, state), m in zip(run(config, 7), sizes, strict=True):
        used = effective(p, state, config)
        slopes = jax.grad(lambda p, s=state: loss(effective(p, s, config), batch(0)))(p)
        through = jax.grad(loss)(used, batch(0))
        for path, weight in p.items():
            groups = np.abs(weight).T.reshape(-1, m)
            order = np.argsort(-groups, axis=1, kind="stable")
            best = np.zeros(groups.shape, bool)
            np.put_along_axis(best, order[:, : m // 2], True, axis=1)
            mask = best.reshape(weight.T.shape).T
            np.testing.assert_array_equal(masks(state)[path], mask)
            np.testing.assert_array_equal(used[path], np.where(mask, weight, 0))
            np.testing.assert_allclose(slopes[path], through[path], rtol=1e-5)


def test_a_dense_finish_makes_everything_live_from_zero():
    history = run(plan(end=4, dense_from=6, structure="transposable"), 8)
    assert live(history[6][1]) == {"a": 32, "b": 32}
    p, state = history[7]
    assert all(m.all() for m in masks(state).values())
    for path, before in masks(history[6][1]).items():
        assert not np.asarray(p[path])[~before].any()
    assert all((x != 0).all() for x in history[8][0].values())


def test_learned_masks_move_while_weights_do_not():
    config = plan(
        density=0.5,
        schedule="constant",
        structure="n_of_m",
        structure_arguments={"m": 4},
        updater="learned",
        updater_arguments={"rate": 0.01, "prior": 1.0},
        estimator="gumbel",
        begin=0,
        end=60,
        every=1,
    )
    history = run(config, 60)
    for path, x in history[-1][0].items():
        np.testing.assert_array_equal(x, params()[path])
    losses = []
    for p, state in (history[0], history[-1]):
        used = effective(p, state, config, training=False)
        held = jnp.concatenate([batch(1000 + i) for i in range(8)])
        losses.append(float(loss(used, held)))
        groups = np.asarray(used["a"] != 0).reshape(2, 4, 16).sum(1)
        assert (groups == 2).all()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("criterion", "tx", "finds"),
    [
        ("fisher", optax.adamw(1e-2), lambda s: s[0].nu),
        ("fisher", optax.adan(1e-2), lambda s: s[0].n),
        ("momentum", optax.adan(1e-2), lambda s: s[0].m),
        ("momentum", optax.lion(1e-2), lambda s: s[0].mu),
        ("momentum", optax.sgd(1e-2, momentum=0.9), lambda s: s[0].trace),
    ],
)
def test_moments_come_from_the_optimisers_state(criterion, tx, finds):
    history = run(plan(criterion=criterion, schedule="one_shot", begin=2, end=2), 3, tx)
    (p, _), (_, state) = history[2:4]
    slopes = jax.grad(loss)(p, batch(2))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
        updates, inner = tx.update(slopes, history[2][1].inner, p)
    moved = optax.apply_updates(p, updates)
    for path, mask in masks(state).items():
        moment = np.asarray(finds(inner)[path])
        score = moved[path] ** 2 * moment if criterion == "fisher" else np.abs(moment)
        score = np.asarray(score).ravel()
        expected = set(np.argsort(-score, kind="stable")[:32].tolist())
        assert set(np.flatnonzero(mask).tolist()) == expected


def test_an_optimiser_without_the_moment_is_refused():
    config = plan(criterion="fisher")
    with pytest.raises(ValueError, match="variance: the optimiser's state has no nu"):
        sparse(optax.sgd(0.1), config).init(params())
    factored = optax.adafactor(1e-2, min_dim_size_to_factor=4)
    with pytest.raises(ValueError, match="choose an optimiser that keeps it"):
        sparse(factored, config).init(params())
    of_updates = optax.adafactor(1e-2, momentum=0.9)
    with pytest.raises(ValueError, match="momentum: the optimiser's state has no mu"):
        sparse(of_updates, plan(criterion="momentum")).init(params())


def test_movement_is_the_sum_of_what_the_loss_pushes_away_from_zero():
    history = run(plan(criterion="movement", begin=4), 3, optax.sgd(0.1))
    expected = {p: np.zeros(s) for p, s in PARAMS.items()}
    for index, (p, _) in enumerate(history[:3]):
        slopes = jax.grad(loss)(p, batch(index))
        expected = {x: expected[x] - p[x] * slopes[x] for x in expected}
    for path, x in history[3][1].kept["movement"].items():
        np.testing.assert_allclose(x[...], expected[path], rtol=1e-4, atol=1e-6)


def slow_hessian_gradient(p, x):
    flat, unravel = jax.flatten_util.ravel_pytree(p)
    value = lambda w: loss(unravel(w), x)  # noqa: E731
    return unravel(jax.hessian(value)(flat) @ jax.grad(value)(flat))


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_measured_derivatives_choose_the_initial_masks(name):
    criterion = {"snip": "saliency", "grasp": "grasp"}[name]
    config = plan(
        schedule="constant",
        updater="static",
        allocation=name,
        initial_criterion=criterion,
    )
    p, x = params(), batch(0)
    tx = sparse(optax.sgd(0.1), config, measured=measure(lambda p: loss(p, x), p))
    found = masks(tx.init(p))
    if name == "snip":
        slopes = jax.grad(loss)(p, x)
        scores = {k: np.abs(p[k] * slopes[k]) for k in p}
    else:
        curved = slow_hessian_gradient(p, x)
        scores = {k: np.asarray(p[k] * curved[k]) for k in p}
    least = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[-64]
    for path, mask in found.items():
        np.testing.assert_array_equal(mask, scores[path] >= least)


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_without_the_measure_the_plan_says_what_to_give(name):
    config = plan(schedule="constant", updater="static", allocation=name)
    with pytest.raises(ValueError, match="measure"):
        sparse(optax.sgd(0.1), config).init(params())


def test_masks_of_another_shape_are_refused():
    tx = sparse(optax.sgd(0.1), plan())
    p = params()
    state = tx.init(p)
    other = state._replace(masks=state.masks | {"a": Mask(jnp.ones((4, 4), bool))})
    with pytest.raises(ValueError, match=r"a has shape \(4, 4\), its parameter"):
        tx.update(p, other, p)
    missing = state._replace(masks={"a": state.masks["a"]})
    with pytest.raises(ValueError, match="mask of b has shape None"):
        tx.update(p, missing, p)


def test_what_is_kept_has_the_axes_of_its_parameter():
    tree_ = nnx.State({"w": nnx.Param(jnp.ones((2, 8, 12)), axes="l d f")})
    config = plan(criterion="movement", track=True)
    kept = sparse(optax.adamw(1e-2), config).init(tree_).kept
    for name in ("movement", "first", "ever"):
        assert kept[name]["w"].axes == "l d f"


STEADY = {"schedule": "constant", "begin": 0, "initial_criterion": "magnitude"}
GROUPS = {"structure": "n_of_m", "structure_arguments": {"m": 4}, "density": 0.5}
STILL = {
    "srigl": {"updater": "srigl", "structure": "constant_fan_in", "moved": 0.6},
    "sparse_momentum": {"updater": "sparse_momentum"},
    "select": {"updater": "select"},
    "learned": {"updater": "learned", "estimator": "gumbel", **GROUPS},
}
# Such a prior is the initial mask, whatever is drawn.
STILL["learned"]["updater_arguments"] = {"rate": 0.0, "prior": 100.0}


@pytest.mark.parametrize("name", sorted(STILL))
def test_a_first_step_at_rate_zero_moves_masks_and_no_weight(name):
    config = plan(**STEADY | STILL[name])
    (before, start), (after, state) = run(config, 1, optax.sgd(0.0))
    old, new = masks(start), masks(state)
    grows = UPDATERS[config.updater] in GROWING
    for path, mask in new.items():
        assert mask.sum() <= old[path].sum()
        assert (mask == old[path]).all() != grows
        stays = mask & old[path] if config.estimator == "masked" else True
        np.testing.assert_array_equal(after[path], np.where(stays, before[path], 0))
        assert mask.sum() == old[path].sum() or config.updater == "srigl"


def test_runs_may_be_mapped_over():
    config = plan(updater="rigl", schedule="constant", begin=0, end=4)
    tx = sparse(optax.adamw(1e-2), config)

    def three(p):
        state = tx.init(p)
        for index in range(3):
            used = lambda p, s=state: effective(p, s, config)  # noqa: E731
            value = lambda p, i=index, used=used: loss(used(p), batch(i))  # noqa: E731
            updates, state = tx.update(jax.grad(value)(p), state, p)
            p = optax.apply_updates(p, updates)
        return p, {path: m[...] for path, m in state.masks.items()}

    some = [params(), jax.tree.map(lambda x: jnp.flip(x, 0), params())]
    both = jax.jit(jax.vmap(three))(jax.tree.map(lambda *x: jnp.stack(x), *some))
    for index, p in enumerate(some):
        weights, live = jax.jit(three)(p)
        for path, mask in live.items():
            np.testing.assert_array_equal(both[1][path][index], mask)
            np.testing.assert_allclose(both[0][path][index], weights[path], rtol=1e-5)


def test_nothing_is_rewound_between_changes_of_masks():
    config = plan(rewind=2)
    p = params()
    state = sparse(optax.sgd(0.1), config).init(p)
    step = jax.tree.map(jnp.ones_like, p), state.inner
    taken, kept = rewound(config, jnp.array(False), state, step, p)
    jax.tree.map(np.testing.assert_array_equal, taken, step)
    # step 0 is not the one to go back to, whose weights are still to come
    jax.tree.map(np.testing.assert_array_equal, kept["early"], (p, state.inner))
