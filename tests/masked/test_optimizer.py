"""``sparse``: what is pruned is 0, everywhere, after every step, for any optimiser."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import tree
from sparsejax.masked import SparseState, effective, masks_of, sparse
from sparsejax.masked.evidence import owners
from tests.masked.networks import (
    DOWN,
    EXPERTS,
    PAIRS,
    PLANS,
    TX,
    UP,
    UPDATERS,
    batch,
    history,
    loss,
    network,
    plan,
    run,
    stepper,
)

MASKED = [UP, DOWN, EXPERTS]


def dead_values(params, state):
    """All weights and state of the size of a weight where its mask is dead."""
    masks = {p: np.asarray(m[...]) for p, m in masks_of(state).items()}
    weights = {p: np.asarray(x) for p, x in tree.leaves(params).items()}
    inner = {p: np.asarray(x) for p, x in tree.leaves(state.inner).items()}
    for path, mask in masks.items():
        yield path, weights[path][~mask]
        for name, x in inner.items():
            if name.endswith("/" + path) and x.shape == mask.shape:
                yield name, x[~mask]


@pytest.mark.parametrize(("name", "updater"), PAIRS)
def test_pruned_weights_and_their_moments_are_zero_after_every_step(name, updater):
    moments = 0
    for params, state in history(name, updater)[1:]:
        for path, values in dead_values(params, state):
            moments += path not in MASKED
            assert not values.any(), path
    assert moments > 0


@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "updater"), [x for x in PAIRS if x[1] != "prune"])
def test_grown_weights_start_from_zero_with_moments_zero(name, updater):
    grown = 0
    for (_, old), (params, state) in itertools.pairwise(history(name, updater)):
        before, after = masks_of(old), masks_of(state)
        inner = tree.leaves(state.inner)
        for path in MASKED:
            new = np.asarray(after[path][...] & ~before[path][...])
            grown += new.sum()
            of_path = [x for p, x in inner.items() if p.endswith("/" + path)]
            for x in [tree.leaves(params)[path], *of_path]:
                assert x.shape != new.shape or not np.asarray(x)[new].any()
    assert grown > 0


def test_muon_has_the_momentum_of_what_is_masked():
    states = jax.tree.leaves(
        history("muon", "rigl")[-1][1].inner,
        is_leaf=lambda x: isinstance(x, optax.contrib.MuonState),
    )
    (state,) = (x for x in states if isinstance(x, optax.contrib.MuonState))
    assert set(tree.leaves(state.mu)) == set(MASKED)
    assert all(x.any() for x in tree.leaves(state.mu).values())


def test_rigl_takes_no_gradient_step_when_it_moves_weights():
    (before, old), (after, new) = history("adamw", "rigl")[2:4]
    for path, x in tree.leaves(before).items():
        y = tree.leaves(after)[path]
        kept = True
        if path in MASKED:
            kept = masks_of(old)[path][...] & masks_of(new)[path][...]
        np.testing.assert_array_equal(np.where(kept, x, 0), y)
    assert int(new.inner[0].count) == int(old.inner[0].count)


@pytest.mark.parametrize("updater", ["rigl", "set"])
def test_a_schedule_counts_every_step_whatever_masks_do(updater):
    rate = optax.inject_hyperparams(optax.adam)(lambda count: 1e-3 / (1 + count))
    tx = optax.chain(optax.scale_by_schedule(lambda count: 1 / (1 + count)), rate)
    _, state = run(tx, UPDATERS[updater], network(jax.random.key(3)), 5)[-1]
    assert [int(x.count) for x in state.inner] == [5, 5]
    assert int(state.inner[1].inner_state[0].count) == {"rigl": 3, "set": 5}[updater]


def test_rigl_grows_where_the_dense_gradient_is_largest():
    config = UPDATERS["rigl"]
    (params, state), (_, after) = history("adamw", "rigl")[2:4]
    # by hand: the gradient that the dead weights would have
    slope = jax.grad(lambda p: loss(p, batch(2)))(params)
    weight, slope = (np.asarray(tree.leaves(x)[UP][1]) for x in (params, slope))
    old, new = (np.asarray(masks_of(s)[UP][1]) for s in (state, after))
    fraction = 0.3 / 2 * (1 + np.cos(np.pi * 2 / config.end))
    moved = int(fraction * old.sum())
    size = np.where(old, np.abs(weight), -1).ravel()
    kept = np.argsort(-size, kind="stable")[: old.sum() - moved]
    size = np.abs(slope).ravel()
    size[kept] = -1
    grown = np.argsort(-size, kind="stable")[:moved]
    expected = np.zeros(old.size, bool)
    expected[kept] = expected[grown] = True
    np.testing.assert_array_equal(new.ravel(), expected)


def test_every_layer_has_its_exact_count_at_every_step():
    left = [1] * 5 + [2 / 3] * 2 + [1 / 3] * 2 + [0] * 2  # of the fall from 1 to 0.25
    for (_, state), share in zip(history("adamw", "prune"), left, strict=True):
        for path in MASKED:
            mask = np.asarray(masks_of(state)[path][...])
            each = mask.reshape(mask.shape[0], -1)
            expected = round((0.25 + 0.75 * share**3) * each.shape[1])
            np.testing.assert_array_equal(each.sum(1), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("updater", sorted(UPDATERS))
def test_masks_change_on_update_steps_only(updater):
    changed = []
    for index, ((_, old), (_, new)) in enumerate(
        itertools.pairwise(history("adamw", updater))
    ):
        pairs = [(masks_of(old)[p][...], masks_of(new)[p][...]) for p in MASKED]
        if any((a != b).any() for a, b in pairs):
            changed.append(index)
    assert changed
    assert set(changed) <= {2, 4, 6, 8}


def test_prune_never_brings_anything_back():
    for (_, old), (_, new) in itertools.pairwise(history("adamw", "prune")):
        for path in MASKED:
            assert not (masks_of(new)[path][...] & ~masks_of(old)[path][...]).any()


def dense_run(tx, params, steps):
    """Train without masks."""

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: loss(p, x))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
    for index in range(steps):
        params, state = step(params, state, batch(index))
    return params


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "updater"),
    [("adamw", "rigl"), ("adamw", "prune"), ("sgd", "static"), ("muon", "rigl")],
)
def test_density_one_is_the_dense_optimiser_bit_for_bit(name, updater, key):
    config = plan(density=1.0, schedule="constant", updater=updater)
    params = run(TX[name], config, network(key), 6)[-1][0]
    expected = dense_run(TX[name], network(key), 6)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_masks_that_are_still_full_change_nothing_but_rounding(key):
    config = plan(begin=6, end=8)
    params = run(TX["sgd"], config, network(key), 6)[-1][0]
    expected = dense_run(TX["sgd"], network(key), 6)
    # another program, which XLA may fuse and round in another way
    for x, y in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["set", "coarse_to_fine"])
def test_a_resumed_run_is_the_same_run_and_compiles_once(name):
    uninterrupted = history("adamw", name)
    saved = jax.tree.map(np.asarray, uninterrupted[3])  # what a checkpoint holds
    params, state = jax.tree.map(jnp.asarray, saved)
    _, step, traces = stepper(TX["adamw"], PLANS[name])
    for index in range(3, 10):
        params, state = step(params, state, batch(index))
        jax.tree.map(
            np.testing.assert_array_equal, (params, state), uninterrupted[index + 1]
        )
    assert len(traces) == 1


def test_buffers_may_be_donated():
    expected = history("adamw", "rigl")[4]
    params = network(jax.random.key(3))
    wrapped, step, _ = stepper(TX["adamw"], UPDATERS["rigl"])
    donating = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(wrapped.init)(params)
    for index in range(4):
        old = params
        params, state = donating(params, state, batch(index))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    # another program, which XLA may fuse and round in another way
    for x, y in zip(*map(jax.tree.leaves, ((params, state), expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_an_average_of_weights_is_masked_where_they_always_were(key):
    config = plan(schedule="constant", updater="static")
    states = run(TX["adamw"], config, network(key), 4)[1:]
    average = optax.ema(0.9)
    kept = average.init(states[0][0])
    with jax.numpy_dtype_promotion("standard"):
        for params, _ in states:
            mean, kept = average.update(params, kept)
    assert not any(values.any() for _, values in dead_values(mean, states[-1][1]))


def test_a_scan_is_the_loop():
    params = network(jax.random.key(3))
    wrapped, step, _ = stepper(TX["adamw"], UPDATERS["set"])
    scanned, _ = jax.lax.scan(
        lambda carry, x: (step(*carry, x), None),
        (params, wrapped.init(params)),
        jnp.stack([batch(index) for index in range(5)]),
    )
    expected = history("adamw", "set")[5]
    for path, mask in masks_of(expected[1]).items():
        np.testing.assert_array_equal(masks_of(scanned[1])[path][...], mask[...])
    # another program, which XLA may fuse and round in another way
    for x, y in zip(*map(jax.tree.leaves, (scanned, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_bfloat16_weights_are_exactly_zero_and_stay_bfloat16(key):
    history = run(TX["adamw"], UPDATERS["rigl"], network(key, jnp.bfloat16), 5)
    for params, state in history[1:]:
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
        assert not any(values.any() for _, values in dead_values(params, state))


def test_masks_carry_the_axes_of_their_parameter(key):
    params = network(key)
    state = sparse(TX["adamw"], plan()).init(params)
    axes = tree.axes_of(params)
    assert {p: m.axes for p, m in masks_of(state).items()} == {
        p: axes[p] for p in MASKED
    }


@pytest.mark.parametrize("estimator", ["straight_through", "sr_ste"])
def test_an_estimator_keeps_the_stored_weights_dense(estimator, key):
    config = plan(estimator=estimator, updater="select", every=1)
    params, state = run(TX["adamw"], config, network(key), 10)[-1]
    values = tree.leaves(effective(params, state, config))
    for path, mask in masks_of(state).items():
        stored = tree.leaves(params)[path]
        assert (stored != 0).all()
        np.testing.assert_array_equal(values[path], jnp.where(mask[...], stored, 0))


def test_effective_is_what_is_stored_after_the_first_update(key):
    config = plan(schedule="constant", updater="static")
    history = run(TX["adamw"], config, network(key), 2)
    for params, state in history[1:]:
        computed = effective(params, state, config)
        jax.tree.map(np.testing.assert_array_equal, computed, params)
    params, state = history[0]
    first = tree.leaves(effective(params, state, config))[UP]
    assert int((first != 0).sum()) == 2 * 24


def flips_of(estimator, arguments):
    """Count the flips of 2:4 masks under gradients that are only noise."""
    config = plan(
        density=0.5,
        schedule="constant",
        initial_criterion="magnitude",
        structure="n_of_m",
        structure_arguments={"m": 4},
        updater="select",
        begin=0,
        end=40,
        every=1,
        estimator=estimator,
        estimator_arguments=arguments,
    )
    tx, params = sparse(optax.sgd(0.1), config), {"w": jnp.ones((16, 16))}
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        noise = {"w": jax.random.normal(key, (16, 16))}
        _, back = jax.vjp(lambda p: effective(p, state, config), params)
        updates, state = tx.update(back(noise)[0], state, params)
        return optax.apply_updates(params, updates), state

    flips = 0
    for index in range(40):
        before = masks_of(state)["w"]
        params, state = step(params, state, jax.random.key(index))
        flips += int((before[...] != masks_of(state)["w"][...]).sum())
    return flips


def test_sr_ste_settles_masks_more_than_straight_through():
    settled = flips_of("sr_ste", {"decay": 1.0})
    assert 0 < settled < 0.7 * flips_of("straight_through", {})


def test_n_of_m_training_keeps_n_in_every_group(key):
    config = plan(
        density=0.5, structure="n_of_m", structure_arguments={"m": 4, "axis": "d"}
    )
    params, _ = run(TX["adamw"], config, network(key), 10)[-1]
    up, down = (np.asarray(tree.leaves(params)[p]) for p in (UP, DOWN))
    assert ((up.reshape(2, 2, 4, 12) != 0).sum(2) == 2).all()
    assert ((down.reshape(2, 12, 2, 4) != 0).sum(3) == 2).all()


def test_masks_are_found_inside_chains_and_nested_plans(key):
    inner = sparse(TX["adamw"], plan(include=(UP,)))
    tx = optax.chain(optax.clip(1.0), sparse(inner, plan(include=(DOWN,), density=0.5)))
    state = tx.init(network(key))
    assert set(masks_of(state)) == {UP, DOWN}
    with pytest.raises(ValueError, match="has no masks; wrap it in sparse"):
        masks_of(optax.EmptyState())


def test_nested_plans_keep_both_budgets(key):
    tx = sparse(
        sparse(TX["sgd"], plan(include=(UP,))), plan(include=(DOWN,), density=0.5)
    )
    params = network(key)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(9):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    live = {p: int((x != 0).sum()) for p, x in tree.leaves(params).items()}
    assert (live[UP], live[DOWN]) == (2 * 24, 2 * 48)


def test_a_plain_tree_has_one_layer_a_matrix():
    params = {"w": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    tx = sparse(optax.adam(0.1), plan(schedule="constant", updater="static"))
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert int((params["w"] != 0).sum()) == 6
    assert (params["bias"] != 0).all()
    assert isinstance(state, SparseState)


def test_state_belongs_to_the_parameter_whose_prefix_is_common():
    params = {"w": jnp.ones(3), "a": {"w": jnp.ones(3)}, "mu": {"w": jnp.ones(3)}}
    state = optax.adam(0.1).init(params)
    assert owners(state, tree.leaves(params)) == {
        f"0/{moment}/{path}": path
        for moment in ("mu", "nu")
        for path in ("w", "a/w", "mu/w")
    }


def test_update_asks_for_the_weights(key):
    tx, params = sparse(TX["sgd"], plan()), network(key)
    with pytest.raises(ValueError, match="pass params to update"):
        tx.update(params, tx.init(params))


def test_seeds_differ_and_one_seed_is_one_run(key):
    params = network(key)
    first = {
        seed: sparse(
            TX["sgd"], plan(schedule="constant", updater="static", seed=seed)
        ).init(params)
        for seed in (0, 1)
    }
    again = sparse(TX["sgd"], plan(schedule="constant", updater="static")).init(params)
    same = masks_of(first[0])[UP][...] == masks_of(again)[UP][...]
    assert same.all()
    assert not (masks_of(first[0])[UP][...] == masks_of(first[1])[UP][...]).all()
    layers = masks_of(again)[UP][...]
    assert not (layers[0] == layers[1]).all()


def test_state_splits_like_any_tree_of_variables(key):
    state = sparse(TX["adamw"], plan()).init(network(key))
    rebuilt = jax.tree.unflatten(*jax.tree.flatten(state)[::-1])
    assert isinstance(rebuilt.masks[UP], nnx.Variable)
    assert rebuilt.masks[UP].axes == "l d f"
