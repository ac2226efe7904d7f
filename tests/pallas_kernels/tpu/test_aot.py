"""The kernels compile for every generation of TPUs, forward and backward together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tpu.cases import CASES, GENERATIONS
from sparsejax.attention import (
    BlockMask,
    Segments,
    block_sparse_attention_and_lse,
    causal,
    fixed,
    sliding_window,
    streaming_llm,
    strided,
)
from sparsejax.sharding.targets import describe

PATTERNS = {
    "causal": lambda heads: causal(),
    "window": lambda heads: streaming_llm(sinks=4, window=4096),
    "heads": lambda heads: tuple(
        [causal(), fixed(128, 16), strided(64), sliding_window(256)][n % 4]
        for n in range(heads)
    ),
}


def mask_of(case, queries):
    sizes = {"q_len": queries, "kv_len": case.length}
    blocks = {"block_q": case.block_q, "block_kv": case.block_kv}
    if case.mask == "elements":
        dense = np.random.default_rng(0).random((queries, case.length)) < 0.1
        return BlockMask.from_dense(dense, **blocks)
    if case.mask == "grants":
        columns = -(-case.length // case.block_kv)
        ids = np.arange(16, dtype="int32") * (columns // 16)
        ids = np.broadcast_to(ids, (case.batch, case.heads, queries, 16))
        count = np.full(ids.shape[:3], 16, "int32")
        blocks["block_q"] = 1
        mask = BlockMask.from_blocks(ids, count, **sizes, **blocks, pattern=causal())
        return mask.coarsened(case.block_q)
    pattern = PATTERNS[case.mask](case.heads)
    offset = case.length - queries
    return BlockMask.from_pattern(pattern, **sizes, **blocks, q_offset=offset)


def shapes_of(case, sharding):
    queries = case.queries or case.length
    shapes = {
        "q": (case.batch, queries, case.heads, case.width),
        "k": (case.batch, case.length, case.key_heads, case.width),
        "bias": (case.batch, case.key_heads, case.length),
        "segments": (case.batch, case.length),
    }
    types = dict.fromkeys("qk", case.dtype) | {"bias": "float32", "segments": "int32"}
    return {
        name: jax.ShapeDtypeStruct(shape, types[name], sharding=sharding)
        for name, shape in shapes.items()
    }


def compiled_for(device, case):
    mesh = Mesh(np.array([device]), "b")
    whole = NamedSharding(mesh, PartitionSpec())
    x = shapes_of(case, whole)
    # Traced tables: nothing may be computed on a device that is not there.
    mask = mask_of(case, case.queries or case.length)
    tables = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=whole), mask
    )

    def loss(q, k, v, bias, mask, numbers):
        extras = {}
        if case.extras:
            segments = Segments(numbers[:, : q.shape[1]], numbers)
            extras = {"softcap": 30.0, "segments": segments, "bias": bias}
        attended = block_sparse_attention_and_lse(
            q, k, v, mask, implementation="mosaic_tpu", **extras
        )
        seen = jnp.where(jnp.isfinite(attended.lse), attended.lse, 0)
        return attended.values.astype("float32").sum() + seen.sum()

    arguments = x["q"], x["k"], x["k"], x["bias"], tables, x["segments"]
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
        return step.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_every_case_compiles_for_every_generation(generation, name):
    target = describe(f"tpu:{generation}:{GENERATIONS[generation]}")
    compiled = compiled_for(target.devices[0], CASES[name])
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.aot
def test_a_loop_that_decodes_keeps_its_cache_as_the_kernels_read_it():
    device = describe(f"tpu:v5e:{GENERATIONS['v5e']}").devices[0]
    mesh = Mesh(np.array([device]), "b")
    case, whole = CASES["decode"], NamedSharding(mesh, PartitionSpec())
    x = shapes_of(case, whole)

    def step(_, state):
        q, k, v, offset = state
        mask = BlockMask.from_pattern(
            causal(),
            q_len=1,
            kv_len=case.length,
            block_q=1,
            block_kv=case.block_kv,
            q_offset=offset,
        )
        q = block_sparse_attention_and_lse(q, k, v, mask).values
        put = jax.lax.dynamic_update_slice_in_dim
        k, v = (put(c, q[:, :, : c.shape[2]], offset, axis=1) for c in (k, v))
        return q, k, v, offset + 1

    def decode(*state):
        return jax.lax.fori_loop(0, 100, step, state)

    offset = jax.ShapeDtypeStruct((), "int32", sharding=whole)
    with jax.set_mesh(mesh):
        traced = jax.jit(decode).trace(x["q"], x["k"], x["k"], offset)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert "tpu_custom_call" in compiled.as_text()
    cache = 2 * x["k"].size  # bytes of the keys
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 10
