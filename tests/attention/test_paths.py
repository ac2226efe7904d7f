"""Which way the XLA path goes is decided by the blocks, and changes no value."""

import jax
import numpy as np
import pytest

from sparsejax.attention import (
    BlockMask,
    block_sparse_attention,
    full,
    key_major,
    sliding_window,
)
from tests.attention.test_operation import (
    MASKS,
    PATHS,
    arrays,
    assert_equal_trees,
    both,
    xla,
)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["tokens", "dense_all", "heads"])
def test_tiles_of_single_keys_equal_the_reference(name, key, monkeypatch):
    q, k, v = arrays(key)
    monkeypatch.setattr(xla, "SMALL_Q", 2)
    mask = MASKS[name]()
    assert xla.suited(mask).block_kv == 128
    fast = both(q, k, v, mask, implementation="xla")
    assert_equal_trees(fast, both(q, k, v, mask, implementation="reference"))


def test_few_and_distant_keys_are_fetched():
    sizes = {"q_len": 512, "kv_len": 512, "block_q": 1, "block_kv": 1}
    ids, count = np.zeros((1, 1, 512, 31), "int32"), np.ones((1, 1, 512), "int32")
    seldom = BlockMask.from_blocks(ids, count, **sizes)
    assert xla.suited(seldom) is seldom
    often = BlockMask.from_blocks(np.pad(ids, [(0, 0)] * 3 + [(0, 1)]), count, **sizes)
    assert xla.suited(often).block_q == 128


@pytest.mark.parametrize(
    ("block_q", "block_kv", "q_len", "expected"),
    [
        (128, 128, 512, "rows"),
        (1, 128, 1, "rows"),
        (1, 128, 512, "key_major"),
        (1, 1, 512, "gathered"),
        (1, 1, 1, "gathered"),
    ],
)
def test_the_blocks_of_a_mask_decide_the_path(block_q, block_kv, q_len, expected):
    blocks = {"block_q": block_q, "block_kv": block_kv}
    mask = BlockMask.from_pattern(full(), q_len=q_len, kv_len=512, **blocks)
    assert xla.path(mask) == PATHS[expected]


def test_a_query_that_reads_few_blocks_fetches_them():
    blocks = {"q_len": 1, "kv_len": 512, "block_q": 1, "block_kv": 128}
    mask = BlockMask.from_pattern(sliding_window(9), **blocks, q_offset=300)
    assert xla.path(mask) == PATHS["gathered"]


@pytest.mark.parametrize("tiles", [1, 3])
def test_tiles_of_queries_are_taken_in_steps(tiles, key, monkeypatch):
    sizes = {"q_len": 40, "kv_len": 40, "block_q": 1, "block_kv": 16}
    mask = BlockMask.from_pattern(sliding_window(20), **sizes)
    q, k, v = arrays(key, t=40, s=40)
    monkeypatch.setattr(key_major, "TILE", 8)
    monkeypatch.setattr(key_major, "STEP", tiles * 8 * q.shape[2] * 16 * q.shape[0])
    assert xla.path(mask) == PATHS["key_major"]
    fast = both(q, k, v, mask, implementation="xla")
    assert_equal_trees(fast, both(q, k, v, mask, implementation="reference"))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("window", "steps"),  # blocks of a step
    [(512, {5}), (1024, {7, 2})],  # 3 full and 2 partial: at once; 7 full: in a loop
)
def test_a_short_list_is_walked_at_once_and_a_long_one_in_steps(window, steps, jitted):
    sizes = {"q_len": 4096, "kv_len": 4096, "block_q": 128, "block_kv": 128}
    mask = BlockMask.from_pattern(sliding_window(window), **sizes)
    x = jax.ShapeDtypeStruct((1, 4096, 4, 64), "float32")

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="xla")

    attend = jax.jit(attend) if jitted else attend
    program = str(jax.make_jaxpr(attend)(x, x, x))
    logits = {
        blocks for blocks in range(1, 9) if f"f32[1,4,128,{128 * blocks}]" in program
    }
    assert logits == steps


def test_no_array_is_as_large_as_the_score_matrix(key):
    n = 256
    q, k, v = arrays(key, b=1, t=n, s=n, c=4)
    mask = BlockMask.from_pattern(
        sliding_window(20), q_len=n, kv_len=n, block_q=16, block_kv=16
    )

    def loss(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="xla").sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert max(_sizes(jaxpr.jaxpr)) < n * n


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (x.aval.size for x in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            found = getattr(inner, "jaxpr", inner)
            if hasattr(found, "eqns"):
                yield from _sizes(found)


def test_what_rematerialisation_keeps_is_not_computed_again(key):
    q, k, v = arrays(key)
    mask = MASKS["causal"]()

    def exponentials(policy):
        def loss(q):
            return block_sparse_attention(q, k, v, mask, implementation="xla").sum()

        both = jax.value_and_grad(jax.checkpoint(loss, policy=policy))
        return jax.jit(both).lower(q).as_text().count("exponential")

    policies = jax.checkpoint_policies
    kept = exponentials(policies.save_only_these_names("attended"))
    assert kept == exponentials(policies.everything_saveable)
    assert kept < exponentials(policies.nothing_saveable)
