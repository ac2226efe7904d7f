"""Grouped products compile for every generation of TPUs, all three of them."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tpu.cases import GENERATIONS
from sparsejax.moe import grouped_matmul
from sparsejax.sharding.targets import describe

# Rows, groups, width, hidden width.
CASES = {
    "many_groups": (8192, 64, 2048, 1024, "bfloat16"),
    "float32": (4096, 8, 512, 512, "float32"),
    "odd_sizes": (420, 4, 96, 200, "float32"),
}


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_every_case_compiles_for_every_generation(generation, name):
    rows, groups, width, hidden, dtype = CASES[name]
    target = describe(f"tpu:{generation}:{GENERATIONS[generation]}")
    mesh = Mesh(np.array(target.devices[:1]), "b")
    whole = NamedSharding(mesh, PartitionSpec())

    def operand(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def all_three(x, w, dy, sizes):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, back(dy)

    given = operand(rows, width), operand(groups, width, hidden), operand(rows, hidden)
    with jax.set_mesh(mesh):
        traced = jax.jit(all_three).trace(*given, operand(groups, dtype="int32"))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3
