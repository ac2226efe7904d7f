"""Routes: what a run's experts did at each evaluation, on tokens counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.data import Batch, DataConfig
from sparsejax.train import routes
from sparsejax.train.routes import Routes, Visits, pictures, visits_of
from tests.train import toy

EXPERTS = 4
FIRST = np.array([[[0, 1], [1, 2], [3, -1], [-1, -1]]], np.int16)
SECOND = np.array([[[1, 0], [1, 3], [2, -1], [-1, -1]]], np.int16)


class Letters:
    def decode(self, ids):
        return "".join(chr(n) for n in ids)


def opened(folder, step=None, active=True):
    return Routes(folder, experts=EXPERTS, step=step, active=active)


def test_an_evaluation_is_compared_with_the_one_before(tmp_path):
    kept = opened(tmp_path / "routes")
    assert kept.add(5, FIRST) == {}
    found = kept.add(10, SECOND)
    np.testing.assert_allclose(found["moe/churn"], [2 / 3])
    np.testing.assert_allclose(found["moe/saturation"], [3 / 5])


def test_a_resumed_run_compares_with_what_it_would_have_compared_with(tmp_path):
    kept = opened(tmp_path)
    kept.add(5, FIRST)
    kept.add(10, FIRST)
    kept.add(15, SECOND)
    assert opened(tmp_path, step=14, active=False).kept.keys() == {5, 10}
    again = opened(tmp_path, step=12)
    assert {path.name for path in tmp_path.iterdir()} == {
        "00000005.npy",
        "00000010.npy",
    }
    np.testing.assert_allclose(again.add(15, SECOND)["moe/churn"], [2 / 3])
    assert not opened(tmp_path).kept
    assert not list(tmp_path.iterdir())


def test_a_process_that_does_not_write_compares_alike(tmp_path):
    kept = opened(tmp_path, active=False)
    kept.add(5, FIRST)
    np.testing.assert_allclose(kept.add(10, SECOND)["moe/churn"], [2 / 3])
    assert not list(tmp_path.iterdir())


def test_saturation_looks_back_from_the_end(tmp_path):
    kept = opened(tmp_path)
    kept.add(5, FIRST)
    kept.add(10, SECOND)
    visits = Visits(SECOND, *np.zeros((2, 4), np.int32))
    data = DataConfig(seq_len=4, batch_size=1)
    found = kept.summed(visits, data, Letters())["saturation"]
    assert {at: x.tolist() for at, x in found.items()} == {
        5: [pytest.approx(0.6)],
        10: [1.0],
    }


def test_pictures_say_who_goes_where():
    tokens = np.array([7, 9, 7, 9, 7, 0], np.int32)
    positions = np.array([0, 1, 2, 3, 0, 0], np.int32)
    chosen = np.array([[[0, 1], [2, -1], [0, -1], [2, 3], [1, 0], [-1, -1]]], np.int16)
    found = pictures(Visits(chosen, tokens, positions), EXPERTS, length=4)
    assert found["ids"].tolist() == [7, 9]  # 0 is padding
    np.testing.assert_allclose(
        found["by_token"][0], [[3 / 5, 2 / 5, 0, 0], [0, 0, 2 / 3, 1 / 3]]
    )
    np.testing.assert_allclose(
        found["by_position"][0],
        [[1 / 2, 1 / 2, 0, 0], [0, 0, 1, 0], [1 / 3, 0, 1 / 3, 1 / 3]],
    )
    np.testing.assert_allclose(found["co_activation"][0, 0], [1, 2 / 3, 0, 0])


def test_rows_of_pictures_have_names(tmp_path):
    kept = opened(tmp_path)
    chosen = np.zeros((1, 3, 1), np.int16)
    visits = Visits(chosen, np.array([97, 97, 98]), np.array([0, 1, 2]))
    found = kept.summed(visits, DataConfig(seq_len=8, batch_size=1), Letters())
    assert found["tokens"] == ["'a'", "'b'"]
    assert found["positions"] == ["0", "1", "from 2", "from 4"]
    assert found["saturation"] == {}


def test_padding_visits_nothing_and_many_tokens_are_thinned(monkeypatch):
    monkeypatch.setattr(routes, "TOKENS", 10)
    tokens = np.arange(2 * 13, dtype=np.int32).reshape(2, 13)
    segments = np.ones_like(tokens)
    segments[:, 11:] = 0
    metrics = {
        "moe/evidence/experts": jnp.ones((3, 24, 2), jnp.int32),
        "moe/evidence/weights": jnp.ones((3, 24, 2)),
    }
    found = visits_of(metrics, Batch(tokens, segments, tokens % 13))
    assert found.chosen.shape == (3, 8, 2)
    np.testing.assert_array_equal(found.tokens, [0, 3, 6, 9, 13, 16, 19, 22])
    np.testing.assert_array_equal(found.positions, [0, 3, 6, 9] * 2)
    assert (found.chosen == 1).all()
    at = np.flatnonzero(np.asarray(segments[:, :-1]).ravel()[::3] == 0)
    assert (found.chosen[:, at] == -1).all()
    assert visits_of({}, Batch(tokens, segments, tokens)) is None


def test_visits_are_the_same_on_any_mesh():
    config = toy.toy(masked=None)
    found = []
    for mesh in ({"data": 1}, {"data": 2, "expert": 4}):
        cut = toy.with_section(config, mesh=mesh)
        devices = jax.devices()[: 8 if len(mesh) > 1 else 1]
        _, state, _, evaluate, ambient = toy.start(cut, devices)
        with jax.set_mesh(ambient):
            found.append(jax.tree.map(np.asarray, evaluate(state, toy.batch())[1]))
    for one, many in zip(*found, strict=True):
        np.testing.assert_array_equal(one, many)


def test_a_model_whose_memories_replace_all_experts_counts_no_visits():
    layers = {**toy.TOY["model"], "memory_layers": (0, 1)}
    step, state, train, evaluate, _ = toy.start(
        toy.toy(masked=None, model=layers), toy.one_device()
    )
    assert "moe/load" not in jax.eval_shape(train, state, toy.batch())[1]
    assert jax.eval_shape(evaluate, state, toy.batch())[1] is None
    assert routes.no_visits(step.config.model) == {}


def test_a_line_says_which_experts_none_visited_since_the_line_before():
    train = dataclasses.asdict(toy.toy().train) | {"log_every": 3, "eval_every": 100}
    config = toy.toy(masked=None, train=train)
    _, state, train, _, mesh = toy.start(config, toy.one_device())
    loads, told = [], []
    with jax.set_mesh(mesh):
        for index in range(6):
            state, metrics = train(state, toy.batch(index))
            loads.append(np.asarray(metrics["moe/load"]))
            told.append(np.asarray(metrics["moe/unvisited"]))
    for last in (3, 6):
        window = np.sum(loads[last - 3 : last], axis=0)
        np.testing.assert_allclose(told[last - 1], (window == 0).mean(axis=-1))
    np.testing.assert_array_equal(state.since["moe/load"], sum(loads[3:]))
