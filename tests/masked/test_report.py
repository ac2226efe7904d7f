"""What layers cost: counted by hand here, and no mask passes for a speed-up."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masked.optimizer import Mask
from sparsejax.masked.report import layer_costs
from tests.masked.networks import plan

SHAPE = 16, 24
BLOCK = {"structure": "block", "structure_arguments": {"tile": (8, 8)}}


def costs(mask, **changes):
    params = {"up": jnp.zeros(SHAPE)}
    (found,) = layer_costs(params, {"up": Mask(jnp.asarray(mask))}, plan(**changes))
    return found


def blocks(live):
    return np.kron(np.array(live, bool), np.ones((8, 8), bool))


FEW = blocks([[1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("changes", "bytes_of_indices"),
    [
        ({}, 48),  # a bit for each
        (BLOCK, 2 * 8),  # two numbers a block
        ({"structure": "n_of_m", "structure_arguments": {"m": 4}}, 128 * 2 // 8),
    ],
    ids=["unstructured", "block", "n_of_m"],
)
def test_bytes_are_those_of_live_weights_and_of_where_they_are(
    changes, bytes_of_indices
):
    found = costs(FEW, **changes)
    assert (found.parameters, found.nonzero, found.matrix) == (384, 128, SHAPE)
    assert found.bytes_dense == 4 * 384
    assert found.bytes_sparse == 4 * 128 + bytes_of_indices


def test_a_mask_executes_everything_and_is_no_speed_up():
    found = costs(FEW, **BLOCK)._replace(seconds=1.0, dense_seconds=2.0)
    assert (found.useful_flops, found.executed_flops) == (256, 768)
    with pytest.raises(ValueError, match=r"up: a mask is no speed-up: all 768 FLOPs"):
        _ = found.speedup


def test_live_blocks_execute_themselves_and_are_fast_only_if_measured():
    found = costs(FEW, **BLOCK, products="blocks")
    assert found.useful_flops == found.executed_flops == 256
    with pytest.raises(ValueError, match="no speed-up until they are measured"):
        _ = found.speedup
    assert found._replace(seconds=2.0, dense_seconds=3.0).speedup == 1.5


def test_too_many_live_blocks_execute_everything():
    found = costs(blocks([[1, 1, 0], [1, 1, 0]]), **BLOCK, products="blocks")
    assert found.executed_flops == 768
    with pytest.raises(ValueError, match="a mask is no speed-up"):
        _ = found.speedup


def test_masks_of_another_plan_are_refused():
    with pytest.raises(ValueError, match="the plan masks no 'down'"):
        layer_costs({"up": jnp.zeros(SHAPE)}, {"down": Mask(jnp.ones(3))}, plan())
