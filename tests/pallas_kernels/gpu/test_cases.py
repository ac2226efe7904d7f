"""The kernels compile for an H200 that is not there, and stay in its registers."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.gpu.cases import CASES, arrays, kernels, lists
from sparsejax.attention import (
    BlockMask,
    Segments,
    block_sparse_attention_and_lse,
    causal,
    fixed,
    strided,
)
from sparsejax.sharding.targets import describe

KERNELS = ("forward", "query_gradient", "key_gradients")

pytestmark = [pytest.mark.aot, pytest.mark.timeout(300)]


def compiled(f, *operands):
    """Compile for one H200."""
    mesh = Mesh(np.array(describe("gpu:h200").devices), "b")
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), operands
    )
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*shapes).compile()


def spilled(folder):
    """Bytes that the assembler had to spill, by its report."""
    (report,) = folder.glob("*.ptxas")
    return int(re.search(r"(\d+) bytes spill stores", report.read_text())[1])


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_and_spill_little(name, kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    case = CASES[name]
    x = jax.eval_shape(lambda: arrays(case, jax.random.key(0)))
    row = jax.ShapeDtypeStruct((case.batch, case.heads, case.length), "float32")
    x |= {"lse": row, "delta": row}
    if kernel == "forward":
        x = {n: a for n, a in x.items() if n not in ("do", "lse", "delta")}
    walked = lists(case, by_keys=kernel == "key_gradients")
    compiled(kernels(case)[kernel], x, walked)
    assert spilled(tmp_path) <= case.spills[KERNELS.index(kernel)]


@pytest.mark.parametrize("queries", [2048, 4])
def test_the_operation_compiles_with_its_gradient(queries):
    patterns = (causal(), fixed(128, 16), strided(64), causal())
    sizes = {"q_len": queries, "kv_len": 2048, "block_q": 128, "block_kv": 128}
    mask = BlockMask.from_pattern(
        patterns if queries > 64 else causal(), q_offset=2048 - queries, **sizes
    )

    def loss(x, bias, mask, segments):
        found = block_sparse_attention_and_lse(
            *x, mask, bias=bias, segments=segments, implementation="mosaic_gpu"
        )
        return found.values.astype("float32").sum() + found.lse.sum()

    x = [
        jax.ShapeDtypeStruct((2, t, n, 64), "bfloat16")
        for t, n in ((queries, 4), (2048, 2), (2048, 2))
    ]
    bias = jax.ShapeDtypeStruct((2, 2, 2048), "float32")
    numbers = [jax.ShapeDtypeStruct((2, n), "int32") for n in (queries, 2048)]
    compiled(jax.grad(loss, argnums=(0, 1)), x, bias, mask, Segments(*numbers))
