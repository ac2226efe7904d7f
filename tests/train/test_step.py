import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masked import masks_of
from sparsejax.train.step import statistics
from sparsejax.tree import leaves
from tests.slowly import slowly
from tests.train import toy

# Four units in the last place of a loss of 4: sums are in another order on each mesh.
ROUNDING = 2e-6
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "expert": {"data": 1, "expert": 8},
    "tensor": {"data": 4, "tensor": 2},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, expert, tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "data, expert, context": {"data": 2, "expert": 2, "context": 2},
}

COVERING = {"fsdp, expert, tensor"}


@pytest.fixture(scope="module")
def alone():
    """Twenty steps on one device: losses, and the state they end in."""
    return toy.losses(toy.toy(), 20, toy.one_device())


def test_the_loss_falls(alone):
    losses, _ = alone
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1


# A mixture of three axes; every other mesh is one more compile, and slow.
@pytest.mark.parametrize("name", slowly(MESHES, but=COVERING))
def test_every_mesh_agrees_with_one_device(name, alone):
    losses, _ = toy.losses(toy.toy(mesh=MESHES[name]), 20)
    np.testing.assert_allclose(losses, alone[0], rtol=0, atol=ROUNDING)


def test_micro_batches_are_one_batch():
    # Means over a micro-batch enter the balance loss, so experts are left out here.
    whole, _ = toy.losses(toy.toy(**toy.LEAST), 6, toy.one_device())
    cut, _ = toy.losses(
        toy.toy(**toy.LEAST, optim={"accumulate": 4}), 6, toy.one_device()
    )
    np.testing.assert_allclose(cut, whole, rtol=0, atol=ROUNDING)


def test_logits_in_chunks_are_the_same_loss():
    whole, _ = toy.losses(toy.toy(**toy.LEAST), 4, toy.one_device())
    cut, _ = toy.losses(
        toy.toy(**toy.LEAST, train={"loss_chunk": 8}), 4, toy.one_device()
    )
    np.testing.assert_allclose(cut, whole, rtol=0, atol=ROUNDING)


def test_a_step_is_traced_once(alone):
    _, state, train, _, mesh = toy.start(toy.toy(), toy.one_device())
    with jax.set_mesh(mesh):
        for index in range(6):
            state, _ = train(state, toy.batch(index))
    assert train._cache_size() == 1
    assert int(state.step) == 6


def test_masked_weights_are_zero_and_as_many_as_planned(alone):
    _, state = alone
    weights = {p: np.asarray(x) for p, x in leaves(state.params).items()}
    expert = weights["stacks/0/blocks/0/moe/up"]
    zeros = (expert == 0).sum(axis=(-2, -1))
    assert (zeros == expert[0, 0].size // 2).all()
    assert (weights["embedding"] != 0).all()


def test_a_line_has_the_mean_of_the_flips_since_the_line_before(alone):
    # Masks first lose weights in the ninth step, and every second step is logged.
    _, state, train, _, mesh = toy.start(toy.toy(), toy.one_device())
    seen = []
    with jax.set_mesh(mesh):
        for index in range(10):
            state, metrics = train(state, toy.batch(index))
            seen.append({p: np.array(x[...]) for p, x in masks_of(state.opt).items()})
    moved = {p: seen[9][p] != x for p, x in seen[7].items()}
    share = sum(x.sum() for x in moved.values()) / sum(x.size for x in moved.values())
    assert share > 0.1
    np.testing.assert_allclose(metrics["masked/flip_rate"], share / 2, rtol=1e-5)


def test_evaluation_changes_nothing_and_counts_real_tokens():
    _, state, _, evaluate, mesh = toy.start(toy.toy(), toy.one_device())
    with jax.set_mesh(mesh):
        sums, _ = evaluate(state, toy.batch())
    # 12 and 16 predictions in a row's two documents; none across, none in padding.
    assert float(sums.tokens) == toy.ROWS * (12 + 16)
    assert float(sums.bytes) == float(sums.tokens)


def test_the_first_statistic_that_is_not_finite_is_remembered():
    _, state, train, _, mesh = toy.start(toy.toy(**toy.LEAST), toy.one_device())
    with jax.set_mesh(mesh):
        state, _ = train(state, toy.batch())
        assert state.fault.tolist() == [-1, -1]
        poisoned = jax.tree.map(lambda x: x * jnp.inf, state.params["norm"])
        state.params["norm"] = poisoned
        for _ in range(2):
            state, metrics = train(state, toy.batch())
    step, index = state.fault.tolist()
    assert step == 2
    assert statistics(metrics)[index] == "loss"


def test_z_loss_pulls_the_normaliser_to_zero():
    def normaliser(weight):
        config = toy.toy(**toy.LEAST, train={"z_loss": weight})
        _, state, train, evaluate, mesh = toy.start(config, toy.one_device())
        with jax.set_mesh(mesh):
            for index in range(8):
                part = toy.batch(index)
                state, _ = train(state, part)
            return float(evaluate(state, part)[0].z)

    assert normaliser(1.0) < normaliser(0.0)


@pytest.mark.slow  # three programs to compile
def test_centroids_follow_their_members_on_every_mesh_alike():
    attention = {"selector": "routing", "selection": {"clusters": 4, "top": 8}}
    attention |= {"block_q": 16, "block_kv": 16}
    model = {**toy.LEAST["model"], "attention": attention, "depth": 2}
    mesh = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}

    def centroids(devices=None, **changes):
        config = toy.toy(model=model, masked=None, **changes)
        _, state, train, _, mesh = toy.start(config, devices)
        found = [jax.tree.map(np.array, leaves(state.variables))]
        with jax.set_mesh(mesh):
            for index in range(3):
                state, metrics = train(state, toy.batch(index))
        assert not [name for name in metrics if name.startswith("attention/sums")]
        return [*found, jax.tree.map(np.array, leaves(state.variables))]

    before, after = centroids(toy.one_device())
    (name,) = before
    assert name == "stacks/0/blocks/0/attention/mixer/centroids"
    assert before[name].shape == (2, 2, 4, 8)
    assert (before[name] != after[name]).any(axis=-1).all()
    for changes in ({"mesh": mesh}, {"optim": {**toy.TOY["optim"], "accumulate": 2}}):
        found = centroids(toy.one_device() if "optim" in changes else None, **changes)
        np.testing.assert_allclose(found[1][name], after[name], rtol=0, atol=2e-6)
