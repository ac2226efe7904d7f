"""Measures of routing: what each is at its ends, and on tokens counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.moe.measures import (
    churn,
    co_activation,
    dead_experts,
    information,
    joint_counts,
    position_bucket,
    saturation,
    specialisation,
)

EXPERTS = 4


def visits(*rows):
    """Experts and weights; a negative expert is an unused slot."""
    experts = jnp.asarray(rows, jnp.int32)
    return jnp.abs(experts), (experts >= 0).astype(jnp.float32)


A = visits([0, 1], [1, 2], [3, -1], [-1, -1])
B = visits([1, 0], [1, 3], [2, -1], [-1, -1])


def test_churn_counts_tokens_and_saturation_counts_visits():
    assert churn(A, A, experts=EXPERTS) == 0
    assert saturation(A, A, experts=EXPERTS) == 1
    np.testing.assert_allclose(
        churn(A, B, experts=EXPERTS), 2 / 3
    )  # order is no change
    np.testing.assert_allclose(saturation(A, B, experts=EXPERTS), 3 / 5)


def test_co_activation_is_the_share_of_an_experts_tokens():
    found = np.asarray(co_activation(*A, count=EXPERTS))
    expected = np.array([[1, 1, 0, 0], [0.5, 1, 0.5, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(found, expected)


def test_specialisation_is_the_share_of_a_labels_visits():
    labels = jnp.asarray([5, 5, 2, 2], jnp.int32)
    counts = joint_counts(*A, labels, count=EXPERTS, groups=6)
    np.testing.assert_array_equal(counts[5], [1, 2, 1, 0])
    np.testing.assert_array_equal(specialisation(counts)[2], [0, 0, 0, 1])
    assert not specialisation(counts)[0].any()


def test_information_is_one_if_the_label_decides_and_zero_if_it_does_not():
    assert abs(float(information(3 * jnp.eye(EXPERTS))) - 1) < 1e-5
    assert abs(float(information(jnp.ones((5, EXPERTS))))) < 1e-5
    crowded = jnp.zeros((5, EXPERTS)).at[:, 1].set(2.0)
    assert information(crowded) == 0
    random = jax.random.uniform(jax.random.key(0), (5, EXPERTS))
    p = np.float64(random / random.sum())
    mutual = (p * np.log(p / p.sum(1, keepdims=True) / p.sum(0, keepdims=True))).sum()
    entropy = -(p.sum(0) * np.log(p.sum(0))).sum()
    np.testing.assert_allclose(information(100 * random), mutual / entropy, rtol=1e-4)


def test_positions_are_grouped_by_their_digits():
    positions = jnp.asarray([0, 1, 2, 3, 4, 7, 8, 1000], jnp.int32)
    np.testing.assert_array_equal(
        position_bucket(positions, groups=5), [0, 1, 2, 2, 3, 3, 4, 4]
    )


def test_an_expert_is_dead_if_nothing_came_within_the_window():
    loads = jnp.asarray([[1.0, 0, 5, 0], [0, 0, 5, 0], [0, 0, 5, 2]])
    assert dead_experts(loads, window=1) == 0.5
    assert dead_experts(loads, window=3) == 0.25
    stacked = dead_experts(jnp.stack([loads, loads + 1]), window=2)
    np.testing.assert_array_equal(stacked, [0.5, 0])
    with pytest.raises(ValueError, match="window=4: must be 1 to 3"):
        dead_experts(loads, window=4)
