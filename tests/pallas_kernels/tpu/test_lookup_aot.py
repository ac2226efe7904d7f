"""The search of lookups compiles for every generation of TPUs."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tpu.cases import GENERATIONS
from sparsejax.memory import product_key_top_k
from sparsejax.sharding.targets import describe

# Tokens, heads, sub-keys of a half, slots of a token.
CASES = {
    "memory": (2048, 4, 256, 32),
    "million": (2048, 8, 1024, 16),
    "largest": (1000, 2, 2048, 64),
    "odd_sizes": (130, 2, 100, 7),
}
WIDTH = 256


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_every_case_compiles_for_every_generation(generation, name):
    tokens, heads, r, k = CASES[name]
    target = describe(f"tpu:{generation}:{GENERATIONS[generation]}")
    mesh = Mesh(np.array(target.devices[:1]), "b")
    whole = NamedSharding(mesh, PartitionSpec())
    find = partial(product_key_top_k, k=k, implementation="mosaic_tpu")
    shapes = (tokens, heads, WIDTH), (heads, 2, r, WIDTH // 2)
    given = [jax.ShapeDtypeStruct(x, "float32", sharding=whole) for x in shapes]
    with jax.set_mesh(mesh):
        lowered = jax.jit(find).trace(*given).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" in lowered.compile().as_text()
