import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.bench import table as results
from sparsejax.bench import train as bench
from sparsejax.config import convert, read
from sparsejax.data import Batch, TrainIterator
from sparsejax.train.config import Config
from sparsejax.train.loop import Trainer
from sparsejax.train.metrics import MetricsLog
from sparsejax.train.optim import make_optimizer
from sparsejax.train.step import Step

VOCABULARY = 258
ROWS, LENGTH = 4, 64


@pytest.fixture(autouse=True)
def a_user_s_world():
    """The bare loop is a user's own, who knows nothing of our strictness."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def dense(**model):
    """The dense config, with short rows."""
    values = read(results.ROOT / "configs" / "dense.py")
    values["data"] |= {"seq_len": LENGTH, "batch_size": ROWS}
    values["model"] |= model
    values["train"] |= {"steps": 40, "log_every": 2}
    return values


@pytest.fixture
def config(tmp_path):
    """A dense model of one small layer, and a text of twenty documents."""
    for number in range(20):
        text = f"Document {number} says: the fox jumps over {number} dogs. "
        (tmp_path / f"{number}.txt").write_text(text * (3 + number % 5))
    values = dense(depth=1, width=32)
    values["model"]["ffn"]["hidden"] = 32
    values["data"] |= {
        "files": [str(tmp_path / "*.txt")],
        "cache_dir": str(tmp_path / "cache"),
    }
    return convert(Config, values)


def packed(seed):
    """Documents that end at places of the row's own, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    ends = np.sort(rng.integers(8, LENGTH - 4, (ROWS, 3)), axis=1)[:, :, None]
    at = np.arange(LENGTH + 1)[None]
    segments = 1 + (at[None] >= ends.swapaxes(0, 1)).sum(axis=0)
    starts = np.where(at[None] >= ends.swapaxes(0, 1), ends.swapaxes(0, 1), 0)
    positions = at - starts.max(axis=0)
    segments = np.where(segments == 4, 0, segments)
    return Batch(*(x.astype(np.int32) for x in (tokens, segments, positions)))


def losses_of_both(config, steps):
    """Our step and the bare one from the same parameters on the same batches."""
    ours = Step(config, VOCABULARY, np.ones(VOCABULARY, np.int32))
    state = jax.jit(ours.init)(jax.random.key(1))
    parameters = bench.bare_parameters(state.params, VOCABULARY)
    optimizer = bench.bare_optimizer(config)
    opt, step = optimizer.init(parameters), bench.bare_step(config, optimizer)
    train, found = jax.jit(ours.train), []
    for index in range(steps):
        batch = jax.tree.map(jnp.asarray, packed(index % 2))
        state, metrics = train(state, batch)
        parameters, opt, loss = step(parameters, opt, batch)
        found.append((float(metrics["loss"]), float(loss)))
    return np.array(found).T


@pytest.mark.slow
def test_the_bare_step_is_our_step():
    # Steps 1 and 2 of a pair share a batch, so a wrong update shows at once; the first
    # rates are a thirtieth of the peak and rise.
    ours, same = losses_of_both(convert(Config, dense()), 8)
    np.testing.assert_allclose(same, ours, rtol=1e-5)
    assert ours[-1] < ours[0] - 0.2


def updates_of(optimizer, parameters, steps):
    """What an optimiser makes of the same gradients, some of which need clipping."""
    state, found = optimizer.init(parameters), []
    update = jax.jit(optimizer.update)
    for index in range(steps):
        scale = 3.0**-index
        grads = jax.tree.map(lambda x, s=scale: jnp.cos(37 * x) * s, parameters)
        updates, state = update(grads, state, parameters)
        found.append(jax.tree.leaves(updates))
    return found


@pytest.mark.slow
def test_the_bare_optimizer_is_our_optimizer():
    config = convert(Config, dense(width=32) | {"train": {"steps": 24}})
    params = jax.jit(Step(config, 64, np.ones(64, np.int32)).init)(jax.random.key(0))
    same = bench.bare_parameters(params.params, 64)
    ours = make_optimizer(config.optim, 24, same)
    # Through the warm-up of twenty steps and down the cosine to its end.
    for one, two in zip(
        updates_of(ours, same, 26),
        updates_of(bench.bare_optimizer(config), same, 26),
        strict=True,
    ):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_both_loops_read_the_same_batches_and_stay_the_same_model(config, monkeypatch):
    turns, written = [], {}

    class Recorded(bench.Turns):
        def __init__(self, *args, **sizes):
            super().__init__(*args, **sizes)
            turns.append(self)

    monkeypatch.setattr(bench, "Turns", Recorded)
    monkeypatch.setattr(
        MetricsLog, "write", lambda _, step, row: written.update({step: row["loss"]})
    )
    found = bench.loop_over_bare(config, steps=4, rounds=2)
    assert list(written) == [2, 4, 6, 8, 10, 12]
    same = [float(turns[0].losses[step - 1]) for step in written]
    np.testing.assert_allclose(same, list(written.values()), rtol=1e-5)
    assert len(turns[0].losses) == 12
    assert len(found.ours) == len(found.reference) == 2  # the first turns compile


def test_a_turn_that_ends_without_a_logged_step_is_refused(config):
    with pytest.raises(ValueError, match=r"steps=3: must be a multiple of train\.log"):
        bench.loop_over_bare(config, steps=3, rounds=2)


def test_input_is_timed_without_steps_and_steps_without_input(config, monkeypatch):
    now, read, taken = [0.0], [], []

    def slow_read(self):
        read.append(1)
        now[0] += 2.0
        return packed(0)

    def slow_step(self, state, batch):
        taken.append(1)
        now[0] += 0.5 if len(taken) > 2 else 100.0  # compiles
        return state, {}

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(TrainIterator, "__next__", slow_read)
    monkeypatch.setattr(Trainer, "take_step", slow_step)
    monkeypatch.setattr(Trainer, "init", lambda self: 0)
    found = bench.input_over_use(config, steps=3)
    assert found.ours == [ROWS * LENGTH / 2.0]
    assert found.reference == [ROWS * LENGTH / 0.5]
    assert (len(read), len(taken)) == (41, 5)


def test_the_first_step_is_the_sum_of_its_parts(config):
    seconds = bench.first_step(config)
    parts = ["trace", "lower", "compile", "run"]
    assert list(seconds) == ["first step", "build", "init", *parts]
    assert seconds["first step"] == sum(seconds[part] for part in parts)
    assert min(seconds.values()) > 0


def test_deep_and_shallow_differ_in_depth_alone(config, monkeypatch):
    models = []

    def first_step(config):
        models.append(config.model)
        deep = config.model.depth == 24
        return {"first step": 6.0 if deep else 4.0, "trace": 2.0}

    monkeypatch.setattr(bench, "first_step", first_step)
    whole, part = bench.deep_over_shallow(config, rounds=2)
    assert [model.depth for model in models] == [4, 24, 4, 24, 4]
    assert len({(m.width, m.heads, m.kv_heads, m.ffn) for m in models}) == 1
    assert (whole.ours, whole.reference, whole.target) == (
        [6.0] * 2,
        [4.0] * 2,
        "<= 1.3",
    )
    assert (part.measure, part.target) == ("depth: trace", "")


def test_what_depth_compiles_comes_from_no_cache(tmp_path, monkeypatch):
    def compiled(number):
        jax.jit(lambda x: x * number)(jnp.ones(3)).block_until_ready()
        return len(list(tmp_path.iterdir()))

    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (str(tmp_path), 0), strict=True):
        jax.config.update(name, value)
    bench.compilation_cache.reset_cache()
    try:
        start = compiled(2)
        assert start > 0
        with bench._no_cache():
            assert compiled(3) == start
        assert compiled(4) > start
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        bench.compilation_cache.reset_cache()


def test_a_ratio_is_taken_within_its_pair():
    # The machine was slow in the second pair: both loops were.
    found = bench.Comparison("loop", "steps/s", [9.0, 4.0, 8.0], [10.0, 5.0, 8.0], "x")
    assert found.row() == {
        "measure": "loop",
        "ours": "8",
        "reference": "8",
        "unit": "steps/s",
        "ratio": "0.900",
        "low": "0.800",
        "high": "1.000",
        "target": "x",
    }


def test_only_what_was_measured_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    speed = {"loop": 1.0, "input": 2.0}
    monkeypatch.setattr(
        bench,
        "measured",
        lambda flags: (bench.Comparison(x, "", [speed[x]], [1.0]) for x in flags.parts),
    )
    assert bench.main(["--parts", "loop", "input"]) == 0
    speed["input"] = 3.0
    assert bench.main(["--parts", "input"]) == 0
    rows = {row["measure"]: row for row in results.read_rows("train")}
    assert {name: row["ratio"] for name, row in rows.items()} == {
        "loop": "1.000",
        "input": "3.000",
    }
    assert rows["input"]["jax"] == jax.__version__
    assert "| input | 3 | 1 |" in capsys.readouterr().out


def test_the_parts_are_measured_as_the_flags_say(monkeypatch):
    called = []
    for name in ("loop_over_bare", "input_over_use"):
        monkeypatch.setattr(
            bench, name, lambda config, _=name, **sizes: called.append((_, sizes))
        )
    monkeypatch.setattr(
        bench,
        "deep_over_shallow",
        lambda config, **sizes: called.append(("deep_over_shallow", sizes)) or [],
    )
    monkeypatch.setattr(
        bench, "small_over_huge", lambda **sizes: called.append(("pages", sizes))
    )
    parts = ("loop", "input", "depth", "pages")
    flags = {"parts": parts, "steps": 20, "rounds": 3}
    list(bench.measured(argparse.Namespace(**flags, repeats=2)))
    assert called == [
        ("loop_over_bare", {"steps": 20, "rounds": 3}),
        ("input_over_use", {"steps": 20}),
        ("deep_over_shallow", {"rounds": 2}),
        ("pages", {"steps": 20, "rounds": 2}),
    ]
