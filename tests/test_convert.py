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
from sparsejax.sample import load
from sparsejax.sharding import MeshConfig, make_mesh
from sparsejax.train.loop import train
from tests.train.toy import toy


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """Three steps of a dense model."""
    config = toy(
        model={"ffn": {"kind": "gated", "hidden": 16}, "memory": None,
               "memory_layers": ()},
        masked=None,
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


def test_what_cannot_be_converted_is_refused(dense_run, tmp_path, capsys):
    _, workdir = dense_run
    both = [f"--workdir={workdir}", f"--out={tmp_path / 'x'}", "--experts=2"]
    for flags, message in (
        (["upcycle", *both, "--per_token=3"], "per_token=3: at most experts=2"),
        (["upcycle", *both, "--per_token=1", "--drop=2"], "drop=2.0: must be between"),
        (["table", *both, "--kind=balancd"], "did you mean 'balanced'?"),
        (["table", "--workdir=nowhere", *both[1:], "--kind=random"], "no run here"),
    ):
        assert convert.main(flags) == 2
        assert message in capsys.readouterr().err
    assert GatedExperts._fields[:3] == ("gate", "up", "down")  # what is copied, by name
