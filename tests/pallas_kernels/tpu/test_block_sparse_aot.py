"""Products with live blocks compile for every generation of TPUs, all three of them."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tpu.cases import GENERATIONS
from sparsejax.masked.block_sparse import BlockSparse, block_sparse_matmul
from sparsejax.sharding.targets import describe

# Rows, width, hidden width, sides of a block, live blocks.
CASES = {
    "large_blocks": (8192, 2048, 8192, (256, 256), 26, "bfloat16"),
    "float32": (4096, 1024, 1024, (128, 128), 20, "float32"),
    "narrow_blocks": (4096, 2048, 2048, (64, 64), 102, "bfloat16"),
    "odd_sizes": (420, 96, 200, (48, 40), 3, "float32"),
}


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_every_case_compiles_for_every_generation(generation, name):
    rows, width, hidden, block, live, dtype = CASES[name]
    target = describe(f"tpu:{generation}:{GENERATIONS[generation]}")
    mesh = Mesh(np.array(target.devices[:1]), "b")
    whole = NamedSharding(mesh, PartitionSpec())

    def operand(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def all_three(x, values, dy, *ids):
        def f(x, values):
            w = BlockSparse(values, *ids, (width, hidden))
            return block_sparse_matmul(x, w)

        y, back = jax.vjp(f, x, values)
        return y, back(dy)

    given = operand(rows, width), operand(live, *block), operand(rows, hidden)
    ids = [operand(live, dtype="int32")] * 2
    with jax.set_mesh(mesh):
        traced = jax.jit(all_three).trace(*given, *ids)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3
