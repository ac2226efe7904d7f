"""Products with live blocks: cases that matter, compiled for an H200; sizes refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.gpu import block_sparse_check
from pallas_kernels.gpu.block_sparse import rows_by_blocks, rows_by_rows
from pallas_kernels.gpu.block_sparse_check import CASES, PRODUCTS
from pallas_kernels.gpu.grouped_frame import Tiling
from sparsejax.masked import BlockSparse, block_sparse_matmul
from sparsejax.sharding.targets import describe
from tests.interpreters import DEADLINE, gpu_interpreted

pytestmark = DEADLINE


@pytest.mark.slow  # values are tested with the operation
@gpu_interpreted
def test_the_check_for_a_device_runs_in_the_interpreter(capsys):
    block_sparse_check.main(["--tiny"])
    assert "tiny bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tiling", "block", "words"),
    [
        (Tiling(rows=128), (64, 64), "tiles of 128 rows for 64"),
        (Tiling(rows=64, columns=128), (64, 64), "128 columns for 64: .* divide them"),
        (Tiling(rows=64, columns=64), (96, 64), "96 contracted: pad it"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_launch(tiling, block, words):
    x, ids = jnp.zeros((64, 2 * block[0]), "bfloat16"), jnp.zeros(1, "int32")
    values, lists = jnp.zeros((1, *block), "bfloat16"), (ids, jnp.zeros(3, "int32"))
    with pytest.raises(ValueError, match=words):
        rows_by_blocks(x, values, ids, lists, tiling=tiling)


def test_gradients_of_blocks_want_tiles_that_divide_them():
    x, ids = jnp.zeros((64, 192), "bfloat16"), jnp.zeros(1, "int32")
    tiling = Tiling(rows=64, columns=128)
    with pytest.raises(ValueError, match="tiles of 128 columns for 192"):
        rows_by_rows(x, x, (ids, ids), sides=(192, 192), tiling=tiling)


def compiled(f, given):
    """Compile for one H200."""
    mesh = Mesh(np.array(describe("gpu:h200").devices), "b")
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), given
    )
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*shapes).compile()


@pytest.mark.aot
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_cases_compile_and_spill_nothing(name, product, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    case = CASES[name]
    given = jax.eval_shape(lambda: block_sparse_check.operands(case))
    compiled(block_sparse_check.products(case)[product], given)
    (report,) = tmp_path.glob("*.ptxas")
    assert re.search(r"\b0 bytes spill stores", report.read_text())


@pytest.mark.aot
def test_the_operation_takes_the_kernels_with_its_gradients():
    def all_three(x, values, dy, *ids):
        def f(x, values):
            w = BlockSparse(values, *ids, (384, 640))
            return block_sparse_matmul(x, w, implementation="mosaic_gpu")

        y, back = jax.vjp(f, x, values)
        return y, back(dy)

    shapes = (1000, 384), (7, 64, 128), (1000, 640)
    given = [jax.ShapeDtypeStruct(s, "float16") for s in shapes]
    ids = [jax.ShapeDtypeStruct((7,), "int32")] * 2
    text = compiled(all_three, [*given, *ids]).as_text()
    assert len(re.findall(r" custom-call\(.*mosaic_gpu", text)) == 3
