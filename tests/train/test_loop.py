import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from sparsejax import sample
from sparsejax.config import ConfigError, fingerprint
from sparsejax.sharding.mesh import MeshConfig, make_mesh
from sparsejax.train import checkpoint, loop
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.loop import NonFiniteError, Trainer, _Loop, batch_share, train
from sparsejax.train.metrics import MetricsLog, read_metrics
from sparsejax.train.trained import load
from tests.train import toy

TIMES = ("seconds",)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty short documents of English-like text."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        line = f"Document {number} says: the quick brown fox jumps over {number} dogs. "
        (folder / f"{number}.txt").write_text(line * (3 + number % 5))
    return folder


@pytest.fixture
def config(corpus, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    data = {"files": [str(corpus / "*.txt")], "cache_dir": str(cache)}
    short = {"steps": 8, "eval_batches": 2, "sample_tokens": 4}
    plan = {"density": 0.5, "begin": 2, "end": 6, "every": 2}
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}  # which cut a table's rows and columns
    changes = {
        "masked": plan,
        "mesh": mesh,
        "optim": {"tables": "adam", "weight_decay": 0.1},
    }
    return toy.toy(data=data, train=short, **changes)


@pytest.fixture(scope="module")
def programs():
    """What this module's runs have compiled."""
    return {}


@pytest.fixture(autouse=True)
def traced_once(programs, monkeypatch):
    """Runs of one config on one mesh share their programs: a test makes several."""
    compiled = loop.compiled

    def shared(step, cut, rows, whole):
        key = fingerprint(step.config), rows.mesh
        return programs.setdefault(key, compiled(step, cut, rows, whole))

    monkeypatch.setattr(loop, "compiled", shared)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Where a module's uninterrupted run lives, once a test has made it."""
    return tmp_path_factory.mktemp("straight")


def figures(workdir):
    """Every figure of a run's record but the times."""
    return [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in read_metrics(workdir)
    ]


def bits(workdir):
    """Checksums of all arrays that a run has ended with, by path."""
    path = workdir / "checkpoints" / "8" / "manifest" / "metadata"
    text = path.read_text()
    return json.loads(text)["body"]["checksums"]


def uninterrupted(config, workdir):
    if not (workdir / "summary.json").exists():
        train(config, workdir)
    return figures(workdir)


def test_a_run_leaves_what_it_promises(config, straight):
    rows = uninterrupted(config, straight)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {"loss", "tokens", "moe/load", "memory/usage", "masked/density"} <= set(
        rows[0]
    )
    assert "eval/bits_per_byte" in rows[1]
    assert "moe/churn" not in rows[1]
    assert {"moe/churn", "moe/saturation", "moe/unvisited"} <= set(rows[3])
    assert rows[-1]["masked/density"] == pytest.approx(0.5, abs=0.01)
    assert json.loads((straight / "config.json").read_text())["config"]["seed"] == 0
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["parameters_nonzero"] < summary["parameters_total"]
    assert summary["parameters_active"] < summary["parameters_total"]
    assert summary["sample"].startswith("The ")
    plots = {path.name for path in (straight / "plots").glob("*.png")}
    assert plots >= {"loss.png", "expert_load.png", "attention.png", "masks.png"}
    assert plots >= {"expert_changes.png", "co_activation.png", "token_experts.png"}
    assert list((straight / "tensorboard").iterdir())


def test_a_finished_run_can_be_sampled_from(config, straight, capsys):
    uninterrupted(config, straight)
    flags = [f"--workdir={straight}", "--prompt=Document 7", "--tokens=4"]
    assert sample.main(flags) == 0
    assert capsys.readouterr().out.startswith("Document 7")


def test_a_model_is_loaded_without_what_only_training_needs(
    config, straight, monkeypatch
):
    uninterrupted(config, straight)
    read = []
    sums = checkpoint.checksums
    monkeypatch.setattr(checkpoint, "checksums", lambda x: read.extend(x) or sums(x))
    model, _ = load(straight)
    for part in ("params/", "rest/masks/", "tables/scale/"):
        assert [path for path in read if part in path], part
    assert not [path for path in read if re.search("moments|/mu/|/nu/|fault", path)]
    whole = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(whole):
        trainer = Trainer(toy.with_section(config, mesh={}), whole)
        trainer.data.train.close()
        checkpoints = Checkpoints(straight / "checkpoints", keep=1, read_only=True)
        state = checkpoints.restore(trainer.abstract).state
        checkpoints.close()
        expected = trainer.step.model(state)
    jax.tree.map(assert_array_equal, nnx.state(model), nnx.state(expected))


class KilledError(Exception):
    """Stands for a process that is no more."""


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_is_the_uninterrupted_run(
    step, config, straight, tmp_path, monkeypatch
):
    take = Trainer.take_step

    def deadly(self, state, batch):
        if int(state.step) == step:
            raise KilledError
        return take(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", deadly)
        with pytest.raises(KilledError):
            train(config, tmp_path)
    train(config, tmp_path)
    assert figures(tmp_path) == uninterrupted(config, straight)
    assert bits(tmp_path) == bits(straight)
    assert any("tables/moments" in path for path in bits(straight))


def test_a_finished_run_is_only_summed_up_again(config, straight):
    before, summary = uninterrupted(config, straight), straight / "summary.json"
    scores = json.loads(summary.read_text())
    assert train(config, straight)["finished"]
    assert figures(straight) == before
    again = json.loads(summary.read_text())
    assert again["eval/loss"] == pytest.approx(scores["eval/loss"], rel=1e-6)
    assert again.keys() == scores.keys()


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    number, config, straight, tmp_path, monkeypatch, capfd
):
    write = MetricsLog.write

    def asked(self, step, values):
        write(self, step, values)
        if step == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", asked)
        if number == signal.SIGTERM:
            assert train(config, tmp_path)["finished"] is False
        else:
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path)
            assert "Ctrl-C again stops at once" in capfd.readouterr().err
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.latest() == 2
    checkpoints.close()
    before = read_metrics(tmp_path)[-1]["seconds"]
    assert train(config, tmp_path)["seconds"] > before
    assert figures(tmp_path) == uninterrupted(config, straight)
    times = [row["seconds"] for row in read_metrics(tmp_path)]
    assert times == sorted(times)  # of all sessions, not of the last


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_wait():
    with loop._heard(signal.SIGINT) as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_checkpoint_is_ranked_by_an_evaluation_of_its_own(
    config, tmp_path, monkeypatch
):
    """Lines are logged every second step, evaluations made every third."""
    scores = {3: 1.0, 6: 2.0, 8: 3.0}
    ranked = {}
    monkeypatch.setattr(
        Trainer,
        "evaluate",
        lambda _, state: ({"eval/loss": scores[int(state.step)]}, None),
    )
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda _, step, state, *, loss, **rest: ranked.update({step: loss}),
    )
    monkeypatch.setattr(_Loop, "finish", lambda _, state, finished: {})
    every = {"eval_every": 3, "save_every": 2}
    train(toy.with_section(config, train=every), tmp_path)
    assert ranked == {2: None, 4: None, 6: 2.0, 8: 3.0}
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "eval/loss" in row] == [3, 6, 8]


def test_a_checkpoint_of_one_mesh_loads_on_another(config, straight, corpus):
    uninterrupted(config, straight)
    states = []
    meshes = {"data": 2, "fsdp": 2, "tensor": 2}, {"expert": 2, "fsdp": 4}, {"data": 8}
    for mesh in meshes:
        other = toy.with_section(config, mesh=mesh)
        grid = toy.make_mesh(other.mesh)
        with jax.set_mesh(grid):
            trainer = Trainer(other, grid)
            checkpoints = Checkpoints(straight / "checkpoints", keep=1)
            states.append(checkpoints.restore(trainer.abstract).state)
            checkpoints.close()
            trainer.data.train.close()
    for one, *others in zip(*map(jax.tree.leaves, states), strict=True):
        for other in others:
            assert (jax.device_get(one) == jax.device_get(other)).all()


def test_a_number_that_is_not_finite_stops_the_run_which_can_go_on_from_before(
    config, straight, tmp_path, monkeypatch
):
    take = Trainer.take_step

    def poisoned(self, state, batch):
        if int(state.step) == 5:
            norm = state.params["norm"]
            state.params["norm"] = jax.tree.map(
                lambda x: jax.device_put(x * jnp.inf, x.sharding), norm
            )
        return take(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", poisoned)
        with pytest.raises(NonFiniteError, match=r"step 6: \S+ is not finite .it went"):
            train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    train(config, tmp_path)
    assert figures(tmp_path) == uninterrupted(config, straight)


def test_a_workdir_of_another_config_is_refused(config, straight):
    uninterrupted(config, straight)
    other = toy.with_section(config, optim={"learning_rate": 1e-2})
    with pytest.raises(ConfigError, match=r"optim.learning_rate"):
        train(other, straight)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(config):
    odd = toy.with_section(config, data={"batch_size": 12}, mesh={"data": 8})
    with pytest.raises(ConfigError, match="batch_size=12: a micro-batch of 12 rows"):
        Trainer(odd, toy.make_mesh(odd.mesh))


def test_the_only_process_reads_every_row():
    mesh = toy.make_mesh(MeshConfig(data=4, tensor=2))
    rows = toy.NamedSharding(mesh, toy.PartitionSpec(toy.BATCH))
    assert batch_share(rows, 16) == (0, 1)


def test_a_loop_closes_even_if_it_never_started(config, tmp_path):
    mesh = toy.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        loop = _Loop(trainer, tmp_path, toy.ALONE)
        loop.close()
