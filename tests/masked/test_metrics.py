"""Metrics and cost: counted again by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masked import Mask, cost, masks_of, metrics, sparse
from tests.masked.networks import DOWN, EXPERTS, TX, UP, history, network, plan


def masks(index, updater="rigl"):
    return masks_of(history("adamw", updater)[index][1])


def test_densities_are_given_by_path_and_layer():
    found = jax.jit(metrics)(masks(-1))
    expected = np.asarray(masks(-1)[EXPERTS][...]).reshape(3, -1).mean(1)
    np.testing.assert_allclose(found[f"masked/density/{EXPERTS}"], expected, rtol=1e-6)
    assert found[f"masked/density/{UP}"].shape == (2,)
    live = sum(int(m[...].sum()) for m in masks(-1).values())
    assert float(found["masked/density"]) == pytest.approx(live / (4 * 96 + 3 * 64))
    assert set(found) == {
        "masked/density",
        "masked/dead_units",
        *(f"masked/density/{p}" for p in (UP, DOWN, EXPERTS)),
    }


def test_flip_rate_counts_what_changed():
    old, new = masks(2), masks(3)
    found = jax.jit(metrics)(new, old)
    flips = {p: np.asarray(old[p][...]) != np.asarray(new[p][...]) for p in old}
    total = sum(x.sum() for x in flips.values()) / sum(x.size for x in flips.values())
    assert total > 0
    assert float(found["masked/flip_rate"]) == pytest.approx(total)
    expected = flips[UP].reshape(2, -1).mean(1)
    np.testing.assert_allclose(found[f"masked/flip_rate/{UP}"], expected, rtol=1e-6)


def test_sad_is_what_changed_as_a_share_of_the_live():
    old, new = (
        {"w": jnp.array([[1, 1, 0, 0]]) > 0},
        {"w": jnp.array([[1, 0, 1, 0]]) > 0},
    )
    assert float(metrics(new, old)["masked/sad"]) == 1
    assert float(metrics(new, old)["masked/flip_rate"]) == 0.5


def test_dead_units_are_outputs_without_a_live_input():
    mask = jnp.zeros((2, 3, 4), bool).at[0, 1, 2].set(True)
    for axes, dead in (("l d f", 7 / 8), ("d h c", 11 / 12), ("h c d", 3 / 4)):
        found = metrics({"w": Mask(mask, axes=axes)})
        assert float(found["masked/dead_units"]) == pytest.approx(dead)


def test_what_is_tracked_tells_overlap_and_exploration():
    first, ever = ({"w": jnp.array([x]) > 0} for x in ([1, 1, 0, 0], [1, 1, 1, 0]))
    found = metrics({"w": jnp.array([[1, 0, 1, 0]]) > 0}, first=first, ever=ever)
    assert float(found["masked/overlap"]) == 0.5
    assert float(found["masked/explored"]) == 0.75


def test_equal_masks_have_flip_rate_zero():
    assert float(metrics(masks(3), masks(3))["masked/flip_rate"]) == 0


def test_plain_arrays_are_one_layer():
    found = metrics({"w": jnp.array([[True, False]])})
    assert found["masked/density/w"].shape == ()
    assert float(found["masked/density/w"]) == 0.5


def test_cost_equals_counting_the_weights_that_are_not_zero():
    params, state = history("adamw", "prune")[-1]
    found = cost(params, masks_of(state))
    sizes = [x.size for x in jax.tree.leaves(params)]
    assert found.total == sum(sizes)
    assert found.nonzero == sum(int((x != 0).sum()) for x in jax.tree.leaves(params))
    assert found.bytes_dense == 4 * found.total
    # one bit for each of 576 weights that are masked
    assert found.bytes_sparse == 4 * found.nonzero + 576 // 8


def test_a_mask_without_its_parameter_is_refused(key):
    state = sparse(TX["sgd"], plan()).init(network(key))
    with pytest.raises(ValueError, match="no parameter"):
        cost({"w": jnp.ones(3)}, masks_of(state))
