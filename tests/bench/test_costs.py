"""The report of costs: rows are laid out, and what is not faster is not called so."""

import jax
import jax.numpy as jnp
import pytest

from configs.masked import METHODS
from sparsejax.bench import costs
from sparsejax.config import ConfigError, convert, read
from sparsejax.masked import Blocked
from sparsejax.masked.report import LayerCost
from sparsejax.train.config import Config
from tests.train.toy import LEAST, toy

WIDE = LayerCost("up", (16, 8), 2, 256, 64, 1024, 272, 128.0, 512.0)
PACE = {"rounds": 2, "seconds": 1.0}


def test_a_mask_is_measured_but_not_called_faster():
    found = costs.measured(WIDE, jnp.ones((2, 16, 8)), 4, PACE)
    assert min(found.seconds, found.dense_seconds) > 0
    row = costs.row(found)
    assert set(row) == set(costs.COLUMNS)
    assert row["matrix"] == "2 of 16 x 8"
    assert row["faster"] == "no: a mask"


def test_live_blocks_are_measured_against_the_dense_product():
    live = jnp.zeros((2, 2, 1), bool).at[:, 0].set(True)
    weight = Blocked(jnp.ones((2, 16, 8)), live, None, 1)
    found = costs.measured(WIDE._replace(executed_flops=128.0), weight, 4, PACE)
    ratio = found.dense_seconds / found.seconds
    assert costs.row(found)["faster"] == f"{ratio:.2f} x"


def test_the_masks_are_those_of_the_plans_end():
    values = read("configs/masked.py:gmp")
    state = jax.eval_shape(lambda: costs.ended(convert(Config, values)))
    assert state.opt.masks
    values["masked"] = None
    with pytest.raises(ConfigError, match="no mask to report on"):
        costs.ended(convert(Config, values))


def test_masks_that_ask_a_first_batch_are_chosen_by_one():
    plan = METHODS["grasp"] | {"density": 0.3}
    state = costs.ended(toy(**LEAST | {"masked": plan}))
    masks = state.opt.masks.values()
    live = sum(int(x.get_value().sum()) for x in masks)
    assert live == pytest.approx(0.3 * sum(x.get_value().size for x in masks), rel=0.01)
