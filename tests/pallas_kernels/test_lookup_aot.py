"""The search of lookups compiles for hardware that is not there."""

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


def lowered(name, target, implementation):
    """Lower the whole lookup for one device."""
    tokens, heads, r, k = CASES[name]
    target = describe(target)
    mesh = Mesh(np.array(target.devices[:1]), "b")
    whole = NamedSharding(mesh, PartitionSpec())
    find = partial(product_key_top_k, k=k, implementation=implementation)
    shapes = (tokens, heads, WIDTH), (heads, 2, r, WIDTH // 2)
    given = [jax.ShapeDtypeStruct(x, "float32", sharding=whole) for x in shapes]
    with jax.set_mesh(mesh):
        traced = jax.jit(find).trace(*given)
        return traced.lower(lowering_platforms=(target.platform,))


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_every_case_compiles_for_every_generation_of_tpus(generation, name):
    target = f"tpu:{generation}:{GENERATIONS[generation]}"
    compiled = lowered(name, target, "mosaic_tpu").compile()
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_compiles_for_an_h200_and_spills_nothing(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    lowered(name, "gpu:h200", "mosaic_gpu").compile()
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) >= 2  # one for both halves, one for the pairs
    assert all(" 0 bytes spill stores" in report for report in reports)
