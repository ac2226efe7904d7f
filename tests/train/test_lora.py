"""Thin factors that move in the place of matrices, against factors kept apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.config import ConfigError, convert
from sparsejax.train.lora import LoraConfig, low_rank
from sparsejax.train.optim import OptimConfig, make_optimizer
from sparsejax.tree import leaves
from tests.train import toy

STEPS, RANK = 6, 2
AXES = {
    "stack/up": ("l d f", (3, 6, 10)),
    "stack/experts": ("l e d f", (3, 2, 6, 4)),
    "stack/query": ("l d h c", (3, 6, 2, 4)),
    "stack/out": ("l h c d", (3, 2, 4, 6)),
    "stack/norm": ("l d", (3, 6)),
    "embedding": ("v d", (9, 6)),
}
# Inputs and outputs of each matrix, heads flattened.
MATRICES = {
    "stack/up": (6, 10),
    "stack/experts": (6, 4),
    "stack/query": (6, 8),
    "stack/out": (8, 6),
}


def weights():
    key = jax.random.key(0)
    return {
        path: nnx.Param(jax.random.normal(key, shape), axes=axes)
        for path, (axes, shape) in AXES.items()
    }


def config(lora=None, **changes):
    optim = {"learning_rate": 0.03, "warmup": 2, "clip": 0.5, "weight_decay": 0.1}
    return OptimConfig(**optim | changes, lora=lora or LoraConfig(rank=RANK))


def loss(params, goal):
    return sum(jnp.sum(jnp.square(params[p] - goal[p])) for p in sorted(params))


def arrays(params):
    return {path: x.get_value() for path, x in params.items()}


def adapted(cfg, steps):
    """Move the parameters by the optimiser; give each step's."""
    params, goal, found = weights(), arrays(weights()), []
    goal = {path: jnp.cos(3 * x) for path, x in goal.items()}
    tx = make_optimizer(cfg, STEPS, params)
    state = tx.init(params)
    for _ in range(steps):
        grads = jax.grad(lambda p: loss(arrays(p), goal))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(arrays(params))
    return found, state, goal


def apart(cfg, steps):
    """The slow twin: differentiate through factors that are never merged."""
    found, state, goal = adapted(cfg, 0)
    first, thin = arrays(weights()), state.thin
    plain = make_optimizer(
        OptimConfig(
            learning_rate=cfg.learning_rate,
            warmup=cfg.warmup,
            clip=cfg.clip,
            weight_decay=cfg.weight_decay,
            name=cfg.name,
        ),
        STEPS,
        jax.tree.map(lambda x: x, {"a": arrays(thin.down), "b": arrays(thin.up)}),
    )

    def whole(factors):
        added = {
            path: cfg.lora.scale * jnp.matmul(factors["a"][path], factors["b"][path])
            for path in factors["a"]
        }
        return {
            path: x + added[path].reshape(x.shape) if path in added else x
            for path, x in first.items()
        }

    factors = {"a": arrays(thin.down), "b": arrays(thin.up)}
    inner = plain.init(factors)
    for _ in range(steps):
        grads = jax.grad(lambda f: loss(whole(f), goal))(factors)
        updates, inner = plain.update(grads, inner, factors)
        factors = optax.apply_updates(factors, updates)
        found.append(whole(factors))
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_merged_factors_are_those_kept_apart(name):
    cfg = config(name=name)
    ours, _, _ = adapted(cfg, STEPS)
    for now, then in zip(ours, apart(cfg, STEPS), strict=True):
        for path in AXES:
            # Merging rounds once a step, in units of the weight's last place.
            np.testing.assert_allclose(now[path], then[path], rtol=1e-4, atol=1e-5)


def test_what_is_no_matrix_stays_to_the_bit():
    found, state, _ = adapted(config(), STEPS)
    assert sorted(state.thin.down) == sorted(MATRICES)
    for path, before in arrays(weights()).items():
        assert np.array_equal(found[-1][path], before) == (path not in MATRICES)


def test_what_is_added_has_the_rank_and_both_factors_move():
    found, state, _ = adapted(config(), STEPS)
    first = arrays(weights())
    for path, shape in MATRICES.items():
        change = np.asarray(found[-1][path] - first[path]).reshape(-1, *shape)
        sizes = np.linalg.svd(change, compute_uv=False)
        assert np.all(sizes[:, RANK - 1] > 1e-4)
        assert np.all(sizes[:, RANK:] < 1e-5)
        assert np.any(state.thin.up[path].get_value())


def test_the_first_update_goes_through_down_alone():
    params, lora = weights(), LoraConfig(rank=RANK, scale=3.0)
    tx = low_rank(lambda _: optax.sgd(0.1), lora, params)
    state = tx.init(params)
    updates, _ = tx.update(params, state)
    for path, shape in MATRICES.items():
        down = state.thin.down[path].get_value()
        whole = params[path].get_value().reshape(*down.shape[:-2], *shape)
        expected = -0.1 * 3.0**2 * down @ down.mT @ whole
        found = updates[path].get_value().reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_muon_takes_each_factor_for_a_matrix():
    _, state, _ = adapted(config(name="muon"), 1)
    moments = state.inner[1].inner_states["muon"].inner_state[0].mu
    assert len(jax.tree.leaves(moments)) == 2 * len(MATRICES)


@pytest.mark.parametrize("pattern", ["^stack/up$", "up"])
def test_rates_and_decay_are_by_the_paths_of_matrices(pattern):
    plain = {"name": "sgd", "clip": None}
    found, _, _ = adapted(config(**plain, rates={pattern: 0.0}), 1)
    first = arrays(weights())
    for path in MATRICES:
        assert np.array_equal(found[0][path], first[path]) == (path == "stack/up")
    params = weights()
    tx = make_optimizer(config(**plain, no_decay=(pattern,)), STEPS, params)
    state = tx.init(params)
    _, after = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    for path, down in state.thin.down.items():
        rests = np.array_equal(after.thin.down[path], down)
        assert rests == (path == "stack/up")


def test_only_what_is_included_is_adapted():
    lora = LoraConfig(rank=RANK, include=("query", "out$"))
    _, state, _ = adapted(config(lora), 1)
    assert sorted(state.thin.up) == ["stack/out", "stack/query"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"include": ("querry",)}, r"include='querry': matches no matrix"),
        ({"include": ("embedding",)}, "include='embedding': matches no matrix"),
        ({"rank": 4}, "rank=4: must be less than 4, the shorter side of stack/experts"),
    ],
)
def test_matrices_that_are_not_there_or_too_thin_are_refused(lora, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(config(LoraConfig(**lora)), STEPS, weights())


def test_a_tree_without_matrices_is_refused():
    plain = {"x": nnx.Param(jnp.ones((3, 4)), axes="l d")}
    with pytest.raises(ConfigError, match="no hidden matrix"):
        make_optimizer(config(), STEPS, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"lora": {"rank": 0}}}, "rank=0: must be at least 1"),
        ({"optim": {"lora": {"scale": 0.0}}}, "scale=0.0: must be positive"),
        ({"masked": toy.TOY["masked"]}, "masks keep some at zero"),
        (
            {"optim": {"tables": "sgd", "lora": {}}},
            "tables='sgd': moves rows, and lora lets nothing move",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(changes, message):
    optim = {"learning_rate": 1e-3, "lora": {"rank": 4}, **changes.pop("optim", {})}
    with pytest.raises(ConfigError, match=message):
        convert(
            type(toy.toy()),
            {**toy.TOY, "masked": None, "optim": optim, **changes},
        )


LORA = {"name": "adamw", "learning_rate": 0.03, "lora": {"rank": 3}}


def run(config, steps, devices=None):
    _, state, train, _, mesh = toy.start(config, devices)
    with jax.set_mesh(mesh):
        for index in range(steps):
            state, _ = train(state, toy.batch(index))
    return state


def test_a_mesh_adapts_as_one_device_does_and_state_that_is_no_parameter_rests():
    changes = {**toy.LEAST, "optim": LORA}
    changes["model"] = {**changes["model"], "ffn": toy.TOY["model"]["ffn"]}
    biased = {"router": "sigmoid_top_k", "bias_rate": 0.1}
    changes["model"]["ffn"] = changes["model"]["ffn"] | biased
    alone = run(toy.toy(**changes), 3, toy.one_device())
    cut = run(toy.toy(**changes, mesh={"data": 2, "fsdp": 2, "tensor": 2}), 3)
    one, other = (leaves(jax.tree.map(np.asarray, x.params)) for x in (alone, cut))
    for path, value in one.items():
        np.testing.assert_allclose(other[path], value, rtol=2e-4, atol=2e-5)
    for value in jax.tree.leaves(cut.variables):
        assert not np.any(value)  # biases of the router begin as zeros
    for factor in cut.opt.thin.up.values():
        assert np.any(factor.get_value())


def test_a_model_is_trained_by_the_moments_that_it_is_evaluated_by():
    memory = {**toy.TOY["model"]["memory"], "query_norm": "batch"}
    model = {**toy.LEAST["model"], "memory": memory, "memory_layers": (0,)}
    config = toy.toy(model=model, masked=None, optim=LORA)
    _, state, train, evaluate, mesh = toy.start(config, toy.one_device())
    with jax.set_mesh(mesh):
        state, _ = train(state, toy.batch())
        sums, _ = evaluate(state, toy.batch(1))
        _, metrics = train(state, toy.batch(1))
    np.testing.assert_allclose(metrics["loss"], sums.nll / sums.tokens, rtol=1e-5)


def test_a_restored_run_goes_on_with_the_same_bits(tmp_path):
    config = toy.toy(**toy.LEAST, optim=LORA)
    straight, resumed = toy.interrupted(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
