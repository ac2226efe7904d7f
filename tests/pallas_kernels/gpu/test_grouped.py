"""The frame of grouped products: no race, budgets that hold, compiled for an H200."""

import itertools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.gpu import grouped_check, grouped_frame, interpreted
from pallas_kernels.gpu.grouped import rows_by_weights
from pallas_kernels.gpu.grouped_frame import Tiling
from sparsejax.moe import grouped_matmul
from sparsejax.sharding.targets import describe
from tests.interpreters import DEADLINE, gpu_interpreted

pytestmark = DEADLINE
TINY = Tiling(rows=64, columns=64, slots=2, programs=2)


@gpu_interpreted
def test_a_slot_given_back_too_early_is_found(key, monkeypatch):
    x = jax.random.normal(key, (64, 256), "bfloat16")
    given = x, jnp.ones((1, 256, 64), "bfloat16"), jnp.array([64], "int32")

    def run():
        with interpreted():
            f = jax.jit(lambda *given: rows_by_weights(*given, tiling=TINY))
            return jax.block_until_ready(f(*given))

    run()

    def hasty(acc, a, b):
        # Both slots are free before this product has read its own.
        for slot in range(TINY.slots):
            plgpu.barrier_arrive(free[0].at[slot])
        accumulate(acc, a, b)

    free, accumulate, compute = [], grouped_frame.accumulate, grouped_frame._compute

    def remembering(work, tiling, refs, tiles, item, turn):
        free[:] = [tiles["free"]]
        compute(work, tiling, refs, tiles, item, turn)

    monkeypatch.setattr(grouped_frame, "_compute", remembering)
    monkeypatch.setattr(grouped_frame, "accumulate", hasty)
    with pytest.raises(Exception, match=r"(?i)race|phase|barrier"):
        run()


@pytest.mark.slow  # all that it calls is tested above
@gpu_interpreted
def test_the_check_for_a_device_runs_in_the_interpreter(capsys):
    grouped_check.main(["--tiny"])
    assert "tail bfloat16" in capsys.readouterr().out


def test_a_peer_is_timed_forward_and_backward_on_all_sizes(monkeypatch):
    peer = types.SimpleNamespace(ragged_dot=jax.lax.ragged_dot)
    monkeypatch.setitem(sys.modules, "tokamax", peer)
    sizes = {
        kind: grouped_check.group_sizes(64, 4, kind) for kind in ("even", "skewed")
    }
    given = grouped_check.operands(64, 4, 16, 16, "float32")
    found = list(grouped_check.PEERS["tokamax"](given, sizes))
    wanted = itertools.product(grouped_check.PRODUCTS, sizes)
    assert [(name, kind) for kind, name, _ in found] == list(wanted)
    assert all(took > 0 for *_, took in found)


@pytest.mark.parametrize(
    ("tiling", "shape", "words"),
    [
        (Tiling(rows=192), (256, 64, 256), "tiles of 192 rows .* 64 or 128"),
        (Tiling(), (64, 64, 256), "tiles of 128 rows for 64"),
        (Tiling(), (128, 64, 64), "tiles of 256 columns for 64: .* divide them"),
        (Tiling(), (128, 60, 256), "60 contracted: pad it to a multiple of 64"),
        (Tiling(slots=5), (128, 64, 256), "use fewer slots or smaller tiles"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_launch(tiling, shape, words):
    rows, width, hidden = shape
    x, w = jnp.zeros((rows, width)), jnp.zeros((1, width, hidden))
    with pytest.raises(ValueError, match=words):
        rows_by_weights(x, w, jnp.zeros(1, "int32"), tiling=tiling)


def compiled(f, *shapes):
    """Compile for one H200."""
    mesh = Mesh(np.array(describe("gpu:h200").devices), "b")
    whole = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(s, d, sharding=whole) for s, d in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*given).compile()


@pytest.mark.aot
@pytest.mark.parametrize("product", grouped_check.PRODUCTS)
@pytest.mark.parametrize(
    "tiling",
    [t for t, _ in grouped_check.CHECKED],
    ids=lambda t: f"{t.rows}x{t.columns}",
)
def test_tiles_compile_and_spill_nothing(tiling, product, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    shapes = (8192, 2048), (64, 2048, 1024), (8192, 1024)
    given = [(s, "bfloat16") for s in shapes]
    compiled(grouped_check.products(tiling)[product], *given, ((64,), "int32"))
    (report,) = tmp_path.glob("*.ptxas")
    assert re.search(r"\b0 bytes spill stores", report.read_text())


@pytest.mark.aot
def test_the_operation_takes_the_kernels_with_its_gradients():
    def all_three(x, w, dy, sizes):
        def f(x, w):
            return grouped_matmul(x, w, sizes, implementation="mosaic_gpu")

        y, back = jax.vjp(f, x, w)
        return y, back(dy)

    shapes = (1000, 192), (4, 192, 320), (1000, 320)
    given = [(s, "float16") for s in shapes]
    text = compiled(all_three, *given, ((4,), "int32")).as_text()
    assert len(re.findall(r" custom-call\(.*mosaic_gpu", text)) == 3
