"""First masks by what a batch says of drawn weights, from a config alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import tree
from sparsejax.masked import masks_of
from sparsejax.sharding.mesh import make_mesh
from sparsejax.train.loop import Trainer, train
from sparsejax.train.step import Step
from tests.masked.test_trained_start import newest
from tests.train.toy import LEAST, VOCABULARY, batch, losses, one_device, toy

FIXED = {"density": 0.5, "schedule": "constant", "updater": "static"}
FIXED |= {"begin": 0, "end": 0}
GRASP = FIXED | {"initial_criterion": "grasp", "allocation": "grasp"}
SNIP = FIXED | {"initial_criterion": "saliency", "allocation": "snip"}


def first_masks(plan, **changes):
    """The masks that a run of this plan begins with, and its step and state."""
    config = toy(**LEAST | {"masked": plan} | changes)
    step = Step(config, VOCABULARY, np.ones(VOCABULARY, np.int32))
    with jax.set_mesh(make_mesh(config.mesh, one_device())):
        state = jax.jit(step.init)(jax.random.key(0), batch())
    return {p: np.asarray(m[...]) for p, m in masks_of(state.opt).items()}, state


def slow_scores(params, second):
    """Weight by derivative, the second by differences of the first."""
    config = toy(**LEAST)
    step = Step(config, VOCABULARY, np.ones(VOCABULARY, np.int32))

    @jax.jit
    def slope(params):
        state = step.begin(params, step.variables)
        return step._gradients(state, batch())[2][0]

    with jax.set_mesh(make_mesh(config.mesh, one_device())):
        found = slope(params)
        if second:
            size = 1e-2 / np.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(found)))
            moved = [
                slope(jax.tree.map(lambda w, g, s=s: w + s * size * g, params, found))
                for s in (1, -1)
            ]
            found = jax.tree.map(lambda a, b: a - b, *moved)
    return jax.tree.map(lambda w, g: w * g, params, found)


@pytest.mark.parametrize("plan", [GRASP, SNIP], ids=["grasp", "snip"])
def test_first_masks_are_one_ranking_by_derivatives_of_the_first_batch(plan):
    masks, state = first_masks(plan)
    second = plan is GRASP
    scores = tree.leaves(slow_scores(state.params, second=second))
    flat = {p: np.asarray(scores[p]) for p in masks}
    if not second:
        flat = {p: np.abs(x) for p, x in flat.items()}
    least = np.median(np.concatenate([x.ravel() for x in flat.values()]))
    agree = [np.mean(masks[p] == (flat[p] >= least)) for p in masks]
    assert min(agree) > (0.97 if second else 0.999)  # differences are of float32
    total = sum(m.size for m in masks.values())
    assert sum(m.sum() for m in masks.values()) == total // 2
    assert len({m.mean() for m in masks.values()}) > 1


@pytest.mark.slow  # a program to compile
def test_a_batch_in_parts_says_the_same():
    whole = first_masks(SNIP)[0]
    parts = first_masks(SNIP, optim={"accumulate": 4})[0]
    for path, mask in whole.items():
        assert np.mean(mask == parts[path]) > 0.999


@pytest.mark.slow  # two programs to compile
def test_a_run_of_a_config_trains_under_measured_masks(tmp_path):
    short = {"steps": 3, "eval_every": 3, "save_every": 3, "log_every": 1}
    short |= {"eval_batches": 1, "sample_tokens": 2}
    config = toy(**LEAST | {"masked": GRASP}, train=short)
    assert train(config, tmp_path)["finished"]
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        first = masks_of(trainer.init().opt)
        trainer.data.train.close()
    for path, mask in masks_of(newest(tmp_path).opt).items():
        np.testing.assert_array_equal(mask[...], first[path][...])


def test_neurons_are_given_up_by_path_in_a_run_of_a_config():
    plan = {"density": 0.25, "schedule": "constant", "updater": "srigl"}
    plan |= {
        "begin": 0,
        "end": 4,
        "every": 2,
        "structure": "constant_fan_in",
        "include": ("ffn",),
    }
    plan["updater_arguments"] = {"salient": {"": 1.0, "down": 0.0}}
    state = losses(toy(**LEAST | {"masked": plan}), 5, one_device())[1]
    dead = {
        path.rsplit("/")[-1]: float(np.mean(~np.asarray(mask[...]).any(-2)))
        for path, mask in masks_of(state.opt).items()
    }
    assert dead.pop("down") == 0
    assert min(dead.values()) > 0.2
