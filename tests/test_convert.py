"""Conversions of a run that was trained here: what goes in comes out, or is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax import convert
from sparsejax.config import to_dict
from sparsejax.moe import GatedExperts
from sparsejax.nn import Transformer
from sparsejax.sample import load
from sparsejax.sharding import MeshConfig, make_mesh
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.loop import train
from sparsejax.tree import leaves
from tests.train.toy import LEAST, toy, with_section


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """Three steps of a dense model."""
    config = toy(
        **LEAST,
        train={"steps": 3, "eval_every": 3, "save_every": 3, "log_every": 1,
               "eval_batches": 1, "sample_tokens": 2},
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("dense")
    train(config, workdir / "run")
    return config, workdir / "run"


def upcycle(workdir, out):
    flags = [f"--workdir={workdir}", f"--out={out}", "--experts=4", "--per_token=2"]
    assert convert.main(["upcycle", *flags]) == 0


def hidden_of(model):
    """What a model makes of some ids."""
    graph, state = nnx.split(model)
    ids = jax.random.randint(jax.random.key(0), (2, 32), 0, 48, "int32")
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        return jax.jit(lambda state: nnx.merge(graph, state)(ids).value)(state)


def test_an_upcycled_run_begins_as_the_trained_model(dense_run, tmp_path):
    config, workdir = dense_run
    upcycle(workdir, tmp_path / "sparse")
    (dense, _), (sparse, _) = load(workdir), load(tmp_path / "sparse")
    a, b = hidden_of(dense), hidden_of(sparse)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "sparse/config.json").read_text())["config"]
    model = dataclasses.replace(config.model, ffn=sparse.config.ffn)
    assert written == to_dict(dataclasses.replace(config, model=model))
    assert written["model"]["ffn"]["experts"] == 4


def test_an_upcycled_run_is_cut_over_the_mesh_of_the_run(
    dense_run, tmp_path, monkeypatch
):
    config, workdir = dense_run
    upcycle(workdir, tmp_path / "alone")
    save, shares = Checkpoints.save, {}

    def seen(self, step, state, **rest):
        for path, x in leaves(state).items():
            most = max(shard.data.size for shard in x.addressable_shards)
            shares[path] = most / max(x.size, 1)
        save(self, step, state, **rest)

    other = with_section(config, mesh={"data": 2, "fsdp": 2, "expert": 2})
    with monkeypatch.context() as patch:
        patch.setattr(convert, "config_of", lambda _: other)
        patch.setattr(Checkpoints, "save", seen)
        upcycle(workdir, tmp_path / "cut")
    experts = [share for path, share in shares.items() if path.endswith("moe/up")]
    assert len(experts) == 3  # with two moments
    assert set(experts) == {1 / 4}
    one, two = (
        leaves(nnx.state(load(tmp_path / name)[0], nnx.Param))
        for name in ("alone", "cut")
    )
    for path, x in one.items():
        np.testing.assert_allclose(two[path], x, rtol=1e-6, atol=1e-7)


def test_a_run_whose_new_routers_would_rest_is_not_upcycled(
    dense_run, tmp_path, monkeypatch, capsys
):
    config, workdir = dense_run
    thin = {"learning_rate": 1e-3, "lora": {"rank": 2}}
    other = toy(**LEAST, optim=thin, train=to_dict(config.train))
    monkeypatch.setattr(convert, "config_of", lambda _: other)
    flags = [f"--workdir={workdir}", f"--out={tmp_path / 'x'}"]
    assert convert.main(["upcycle", *flags, "--experts=4", "--per_token=2"]) == 2
    assert "lets new routers rest" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow  # a second program to compile
def test_an_upcycled_run_goes_on_training(dense_run, tmp_path):
    config, workdir = dense_run
    out = tmp_path / "sparse"
    upcycle(workdir, out)
    model = dataclasses.replace(config.model, ffn=load(out)[0].config.ffn)
    assert train(dataclasses.replace(config, model=model), out)["finished"]


def test_tables_are_made_of_a_run(dense_run, tmp_path):
    _, workdir = dense_run
    ids = load(workdir)[1].vocab_size
    for kind in ("random", "balanced", "clustered", "dispersed"):
        out = tmp_path / f"{kind}.npy"
        flags = [f"--workdir={workdir}", f"--out={out}", f"--kind={kind}"]
        assert convert.main(["table", *flags, "--experts=4", "--batches=2"]) == 0
        table = np.load(out)
        assert table.shape == (ids,)
        assert set(table) <= set(range(4))


def test_a_table_that_cannot_be_made_leaves_no_file(dense_run, tmp_path, capsys):
    flags = [f"--workdir={dense_run[1]}", f"--out={tmp_path / 'x'}", "--kind=clustered"]
    assert convert.main(["table", *flags, "--experts=1000"]) == 2
    assert "must be at least as many as experts=1000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_converted_is_refused(dense_run, tmp_path, capsys):
    _, workdir = dense_run
    both = [f"--workdir={workdir}", f"--out={tmp_path / 'x'}", "--experts=2"]
    for flags, message in (
        (["upcycle", *both, "--per_token=3"], "per_token=3: at most experts=2"),
        (["upcycle", *both, "--per_token=1", "--drop=2"], "drop=2.0: must be between"),
        (["table", *both, "--kind=balancd"], "did you mean 'balanced'?"),
        (["table", *both[:2], "--experts=0", "--kind=random"], "--experts=0: must be"),
        (["table", *both[::2], "--out=no/x", "--kind=random"], "must be a file in a"),
        (["table", "--workdir=nowhere", *both[1:], "--kind=random"], "no run here"),
    ):
        assert convert.main(flags) == 2
        assert message in capsys.readouterr().err
    assert GatedExperts._fields[:3] == ("gate", "up", "down")  # what is copied, by name


@pytest.mark.slow  # three programs to compile
def test_finetuning_moves_what_is_specific_and_freezes_all_else(tmp_path):
    every = {"steps": 3, "eval_every": 3, "save_every": 3, "log_every": 1}
    config = toy(
        model={"ffn": {"kind": "gated", "hidden": 16}},
        masked=None,
        train={**every, "eval_batches": 1, "sample_tokens": 2},
    )
    train(config, tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'new'}"]
    flags += ["--batches=2", "--config.optim.tables=sgd", "--config.seed=3"]
    flags += ["--config.optim.table_rows=2", "--config.optim.clip=none"]
    assert convert.main(["finetune", *flags]) == 0
    before, after = load(tmp_path / "run")[0], load(tmp_path / "new")[0]
    a, b = (leaves(nnx.state(x, nnx.Param)) for x in (before, after))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    new = convert.config_of(tmp_path / "new")
    assert new.seed == 3
    assert train(new, tmp_path / "new")["finished"]
    c = leaves(nnx.state(load(tmp_path / "new")[0], nnx.Param))
    for path, x in c.items():
        rows = (np.asarray(x) != np.asarray(a[path])).any(-1)
        most = 2 * new.train.steps if path.endswith("memory/values") else 0
        assert (rows.sum() > 0) == (most > 0), path
        assert rows.sum() <= most, path


def test_what_froze_for_rows_moves_again_when_it_is_finetuned_as_a_whole():
    params = nnx.eval_shape(
        lambda: nnx.state(Transformer(toy().model, 48, rngs=nnx.Rngs(0)), nnx.Param)
    )
    first = toy(masked=None)

    def followed(before, **changes):
        optim = dataclasses.replace(before.optim, **changes)
        new = dataclasses.replace(before, optim=optim)
        optim = convert._followed(before, new, params)
        return dataclasses.replace(new, optim=optim)

    rows = followed(first, tables="sgd", table_rows=2)
    assert rows.optim.rates[""] == 0
    assert followed(rows, learning_rate=1.0).optim.rates == rows.optim.rates
    assert followed(rows, table_rows=None).optim.rates == {}
    assert followed(rows, table_rows=None, rates={"ffn": 2.0}).optim.rates == {
        "ffn": 2.0
    }


def test_finetuning_refuses_another_model_and_what_is_no_override(dense_run, tmp_path):
    _, workdir = dense_run
    flags = [f"--workdir={workdir}", f"--out={tmp_path / 'new'}"]
    for flag in ("--config.model.depth=3", "--config.seed", "--seed=3"):
        assert convert.main(["finetune", *flags, flag]) == 2
    nobody = [f"--workdir={tmp_path / 'nobody'}", flags[1]]
    assert convert.main(["finetune", *nobody]) == 2
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        convert.main(["upcycle", *flags, "--experts=4", "--per_token=2", "--seed=3"])
