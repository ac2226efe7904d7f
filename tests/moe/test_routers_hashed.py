"""Hashes: what decides, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.moe.routers.hashed import (
    hash_bigram,
    hash_position,
    hash_previous,
    hash_random,
    hash_table,
    multi_hash,
)

EXPERTS = 8


def blank(tokens):
    return jnp.zeros((tokens, EXPERTS))


def experts(router, **ids):
    ids = {name: jnp.asarray(x, jnp.int32) for name, x in ids.items()}
    return np.asarray(router(blank(len(next(iter(ids.values())))), **ids).experts)[:, 0]


def test_the_same_id_has_the_same_expert_wherever_it_is():
    chosen = experts(hash_random, tokens=[3, 9, 3, 4, 3])
    assert chosen[0] == chosen[2] == chosen[4]


def test_a_random_hash_spreads_ids_and_a_seed_draws_another():
    ids = jnp.arange(4096, dtype=jnp.int32)
    a, b = (hash_random(blank(4096), tokens=ids, seed=s).experts for s in (1, 2))
    for chosen in (a, b):
        counts = np.bincount(np.ravel(chosen), minlength=EXPERTS)
        assert abs(counts - 512).max() < 5 * np.sqrt(512)
    assert abs(float((a == b).mean()) - 1 / EXPERTS) < 0.03


def test_a_bigram_hash_reads_both_ids_in_their_order():
    ids = np.arange(200)
    forward = experts(hash_bigram, previous=ids, tokens=ids + 1)
    backward = experts(hash_bigram, previous=ids + 1, tokens=ids)
    other = experts(hash_bigram, previous=ids + 7, tokens=ids + 1)
    again = experts(hash_bigram, previous=ids, tokens=ids + 1)
    np.testing.assert_array_equal(forward, again)
    for changed in (backward, other):
        assert (forward == changed).mean() < 0.3


def test_previous_and_position_hashes_read_those_alone():
    ids = [5, 6, 7]
    plain = experts(hash_random, tokens=ids)
    np.testing.assert_array_equal(experts(hash_previous, previous=ids), plain)
    np.testing.assert_array_equal(experts(hash_position, positions=ids), plain)


def test_multi_hash_has_a_hash_for_each_part_of_the_experts():
    ids = jnp.arange(500, dtype=jnp.int32)
    routing = multi_hash(blank(500), k=2, tokens=ids)
    part = np.asarray(routing.experts) // 4
    np.testing.assert_array_equal(part, [[0, 1]] * 500)
    a, b = (np.asarray(routing.experts) % 4).T
    assert abs((a == b).mean() - 1 / 4) < 0.1  # independent
    one = multi_hash(blank(500), k=1, tokens=ids)
    np.testing.assert_array_equal(
        one.experts, hash_random(blank(500), tokens=ids).experts
    )


def test_multi_hash_refuses_parts_that_are_not_equal():
    with pytest.raises(ValueError, match="k=3: must be at least 1 and divide the 8"):
        multi_hash(blank(2), k=3, tokens=jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
    ("router", "missing"),
    [(hash_random, "tokens"), (hash_bigram, "previous"), (hash_previous, "previous"),
     (hash_position, "positions"), (hash_table, "tokens"), (multi_hash, "tokens")],
)  # fmt: skip
def test_a_hash_without_its_ids_is_refused(router, missing):
    with pytest.raises(ValueError, match=f"{missing}=None: .*pass {missing}="):
        router(blank(2), k=1)


def test_hash_table_looks_the_expert_up():
    table = jnp.asarray([3, 1, 7], jnp.int32)
    ids = jnp.asarray([2, 0, 0, 1], jnp.int32)
    routing = hash_table(blank(4), tokens=ids, table=table)
    np.testing.assert_array_equal(routing.experts[:, 0], [7, 3, 3, 1])
    np.testing.assert_array_equal(routing.weights, jnp.ones((4, 1)))
    np.testing.assert_array_equal(jax.nn.one_hot(routing.experts[:, 0], 8), routing[2])
