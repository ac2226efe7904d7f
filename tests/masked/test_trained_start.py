"""Masked runs that begin with the weights of a trained dense one."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.masked import METHODS
from sparsejax import convert
from sparsejax.masked import MaskedConfig, effective, masks_of
from sparsejax.masked.budgets import begins_dense
from sparsejax.sharding import MeshConfig
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.loop import Trainer, train
from sparsejax.train.metrics import read_metrics
from sparsejax.train.trained import alone, load
from sparsejax.tree import leaves
from tests.masked import test_recipes as recipes
from tests.test_convert import hidden_of
from tests.train.toy import LEAST, toy

EVERY = {"eval_every": 9, "save_every": 2, "log_every": 1, "eval_batches": 1}
LEARNED = METHODS["mask_llm"] | {"end": 2}


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """Three steps of a dense model whose layers have room for tiles of 32 by 32."""
    model = LEAST["model"] | {"width": 128, "ffn": {"kind": "gated", "hidden": 256}}
    short = {**EVERY, "steps": 3, "sample_tokens": 2}
    workdir = tmp_path_factory.mktemp("dense") / "run"
    train(toy(model=model, masked=None, train=short), workdir)
    return workdir


def begun(workdir, out, plan, *more):
    """Begin a masked run with the end of a dense one; its workdir."""
    flags = [f"--config.masked.{name}={value}" for name, value in plan.items()]
    where = [f"--workdir={workdir}", f"--out={out}"]
    assert convert.main(["finetune", *where, *more, *flags]) == 0
    return out


def newest(workdir):
    """What the newest checkpoint of a run holds."""
    with jax.set_mesh(alone()):
        trainer = Trainer(convert.config_of(workdir), alone())
        trainer.data.train.close()
        checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
        found = checkpoints.restore(trainer.abstract)
        checkpoints.close()
    return found.state


def params_of(workdir):
    return leaves(nnx.state(load(workdir)[0], nnx.Param))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_begin_with_trained_weights(name, dense_run, tmp_path):
    plan = METHODS[name] | {"moved": 0.5}  # of few tiles, so that some do
    out = begun(dense_run, tmp_path / "new", plan, "--config.train.steps=100")
    state, plan = newest(out), convert.config_of(out).masked
    dense = params_of(dense_run)
    for path, x in leaves(state.params).items():
        np.testing.assert_array_equal(x, dense[path])
    for path, mask in masks_of(state.opt).items():
        live = np.asarray(mask[...])
        assert live.all() == begins_dense(plan), path
        by_size = plan.initial_criterion == "magnitude"
        if by_size and plan.structure == "unstructured":  # one number tells all
            size = np.abs(np.asarray(dense[path])).reshape(live.shape)
            for layer, kept in zip(size, live, strict=True):
                assert kept.all() or layer[kept].min() >= layer[~kept].max(), path
    moments = [x for p, x in leaves(state.opt).items() if "/mu/" in p or "/nu/" in p]
    assert moments
    assert not any(np.asarray(x).any() for x in moments)


def halved(weight):
    """Keep the two largest of every four along what the product sums over, slowly."""
    kept = np.zeros_like(weight)
    layers, inputs, outputs = weight.shape
    for layer, d, f in np.ndindex(layers, inputs // 4, outputs):
        group = np.abs(weight[layer, 4 * d : 4 * d + 4, f])
        best = 4 * d + np.argsort(-group, kind="stable")[:2]
        kept[layer, best, f] = weight[layer, best, f]
    return kept


def test_the_first_loss_is_that_of_the_dense_model_under_the_masks(dense_run, tmp_path):
    out = begun(dense_run, tmp_path / "new", LEARNED, "--config.train.steps=4")
    dense, found = load(dense_run)[0], load(out)[0]
    graph, params, rest = nnx.split(dense, nnx.Param, ...)
    by_hand = jax.tree_util.tree_map_with_path(
        lambda path, x: halved(np.asarray(x)) if "ffn" in str(path) else x, params
    )
    expected = nnx.merge(graph, jax.tree.map(jnp.asarray, by_hand), rest)
    np.testing.assert_array_equal(hidden_of(found), hidden_of(expected))


@pytest.mark.slow  # a program to compile
def test_learned_masks_are_of_trained_weights_that_stay(dense_run, tmp_path):
    more = "--config.train.steps=4", "--config.masked.updater_arguments.rate=0.1"
    out = begun(dense_run, tmp_path / "new", LEARNED, *more)
    first = newest(out)
    assert train(convert.config_of(out), out)["finished"]
    last, dense = newest(out), params_of(dense_run)
    moved = [
        (first.opt.masks[path][...] != mask[...]).any()
        for path, mask in last.opt.masks.items()
    ]
    assert any(moved)
    for path in last.opt.masks:
        np.testing.assert_array_equal(leaves(last.params)[path], dense[path])


def pruned(every):
    """Prune two trained matrices by movement; the loss at the end, and that before."""
    before = recipes.run(recipes.plan(density=1.0), 100)[-1][0]
    config = MaskedConfig(**METHODS["movement"] | {"every": every})
    after, state = recipes.run(config, 100, p=before)[-1]
    held = jnp.concatenate([recipes.batch(1000 + i) for i in range(8)])
    return [recipes.loss(p, held) for p in (effective(after, state, config), before)]


def test_masks_that_follow_movement_do_so_at_once():
    assert METHODS["movement"]["every"] == 1
    (at_once, dense), (late, _) = pruned(1), pruned(10)
    assert dense < at_once < late / 2


def test_what_first_masks_are_chosen_by_is_what_was_said():
    masks, plain = "--config.masked", {"density": 0.5}
    grasp, usual = METHODS["grasp"], plain | {"criterion": "gradient"}
    for plan, flags, expected in (
        (None, [f"{masks}.density=0.5"], "magnitude"),
        (None, [f"{masks}={{'density': 0.5}}"], "magnitude"),
        (None, [f"{masks}={plain | {'initial_criterion': 'random'}}"], "random"),
        (usual, [], "gradient"),
        (usual, [f"{masks}.initial_criterion=random"], "random"),
        (grasp, ["--config.train.steps=30"], "grasp"),
    ):
        before = toy(**{**LEAST, "masked": plan})
        after = convert._overridden(before, flags)
        assert after.masked.initial_criterion == expected


class KilledError(Exception):
    """Stands for a process that is no more."""


@pytest.mark.slow  # three programs to compile
def test_a_trained_start_resumes_and_is_the_same_on_eight_devices(
    dense_run, tmp_path, monkeypatch
):
    plan = {"density": 0.25, "updater": "rigl", "schedule": "constant"}
    plan |= {"end": 2, "every": 2}
    out = begun(dense_run, tmp_path / "new", plan, "--config.train.steps=4")
    killed, many = tmp_path / "killed", tmp_path / "many"
    for other in (killed, many):
        shutil.copytree(out, other)
    config = convert.config_of(out)
    train(config, out)
    take = Trainer.take_step

    def deadly(self, state, batch):
        if int(state.step) == 3:
            raise KilledError
        return take(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", deadly)
        with pytest.raises(KilledError):
            train(config, killed)
    train(config, killed)
    train(dataclasses.replace(config, mesh=MeshConfig(fsdp=4, tensor=2)), many)
    one, again, cut = (newest(x) for x in (out, killed, many))
    jax.tree.map(np.testing.assert_array_equal, again, one)
    losses = [[x["loss"] for x in read_metrics(w)] for w in (out, killed, many)]
    assert losses[0] == losses[1]
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)  # sums in another order
    a, b = masks_of(one.opt), masks_of(cut.opt)
    flips = [np.mean(a[path][...] != b[path][...]) for path in a]
    assert max(flips) < 1e-3, flips


def test_what_is_not_known_of_a_trained_start_is_said(dense_run, tmp_path, capsys):
    flags = [f"--workdir={dense_run}", f"--out={tmp_path / 'new'}"]
    flags += ["--config.masked.density=0.5", "--config.masked.schedule=constant"]
    for criterion in ("fisher", "movement", "momentum"):
        chosen = f"--config.masked.criterion={criterion}"
        assert convert.main(["finetune", *flags, chosen]) == 2
        assert "before the first step; choose" in capsys.readouterr().err
