"""The kernels of grouped_matmul meet its edges, in their interpreters."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gpu, tpu
from sparsejax.moe import grouped, grouped_matmul
from tests.interpreters import DEADLINE, GPU

pytestmark = DEADLINE
ROWS, WIDTH, HIDDEN, GROUPS = 200, 64, 64, 4
SIZES = (130, 1, 20, 24)  # more than a tile, one row, parts of 8 rows; a tail is left
KERNELS = {
    "mosaic_tpu": (tpu.interpreted, "float32", 1e-5),
    "mosaic_gpu": (gpu.interpreted, "bfloat16", 2**-8),
}
runs = pytest.mark.parametrize("name", ["mosaic_tpu", GPU])
PATTERNS = [*itertools.product((0, 1), repeat=GROUPS)]


def compiled(name):
    @jax.jit
    def run(x, w, dy, sizes):
        def f(x, w):
            return grouped_matmul(x, w, sizes, implementation=name)

        y, back = jax.vjp(f, x, w)
        return y, *back(dy)

    def interpreted(*given):
        mode = KERNELS[name][0] if name in KERNELS else contextlib.nullcontext
        with mode():
            return jax.block_until_ready(run(*given))

    return interpreted


RUN = {name: compiled(name) for name in ("reference", *KERNELS)}


def operands(key, dtype):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (ROWS, WIDTH))
    w = jax.random.normal(keys[1], (GROUPS, WIDTH, HIDDEN))
    dy = jax.random.normal(keys[2], (ROWS, HIDDEN))
    return [a.astype(dtype) for a in (x, w, dy)]


def assert_right(key, name, sizes, *, poisoned=True):
    """Agree with the reference in float32 when all dead rows are NaN."""
    _, dtype, bound = KERNELS[name]
    x, w, dy = operands(key, dtype)
    sizes, used = jnp.asarray(sizes, "int32"), sum(sizes)
    exact = RUN["reference"](*(a.astype("float32") for a in (x, w, dy)), sizes)
    dead = (jnp.arange(ROWS) >= used)[:, None] & poisoned
    x, dy = (jnp.where(dead, jnp.nan, a).astype(dtype) for a in (x, dy))
    found = RUN[name](x, w, dy, sizes)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        error = jnp.abs(a.astype("float32") - b).max()
        assert error <= bound * jnp.abs(b).max()
    y, dx, dw = found
    assert not y[used:].any()
    assert not dx[used:].any()
    for g, size in enumerate(sizes):
        assert dw[g].any() == (size > 0)


@pytest.mark.few(5)
@runs
@pytest.mark.parametrize("live", PATTERNS, ids=str)
def test_every_pattern_of_empty_groups_is_right_with_its_gradients(key, name, live):
    assert_right(key, name, [n * size for n, size in zip(live, SIZES, strict=True)])


@pytest.mark.few(4)
@runs
@pytest.mark.parametrize(
    "sizes", [(0, ROWS, 0, 0), (0, 0, 1, 0), (0, 0, 0, ROWS), (64, 64, 8, 64)], ids=str
)
def test_huge_groups_single_rows_and_whole_tiles_are_right(key, name, sizes):
    assert_right(key, name, sizes)


@runs
def test_a_poisoned_group_does_not_touch_its_neighbours(key, name):
    x, w, dy = operands(key, KERNELS[name][1])
    sizes, first = jnp.asarray(SIZES, "int32"), SIZES[0]
    y, dx, dw = RUN[name](x.at[:first].set(jnp.nan), w.at[0].set(jnp.nan), dy, sizes)
    assert jnp.isnan(y[:first]).all()
    assert all(jnp.isfinite(a).all() for a in (y[first:], dx[first:], dw[1:]))


@pytest.mark.parametrize(
    ("here", "name"), [("cpu", "xla"), ("gpu", "xla"), ("tpu", "mosaic_tpu")]
)
def test_none_takes_the_kernel_of_the_platform(here, name, monkeypatch):
    monkeypatch.setattr(grouped, "platform", lambda: here)
    assert grouped._default() == name


@pytest.mark.parametrize(
    ("name", "dtype", "width", "words"),
    [
        ("mosaic_gpu", "float32", 64, "with float32.*cast x and w, or use 'xla'"),
        ("mosaic_gpu", "bfloat16", 60, "weights of 60 x 64.*multiples of 64; pad"),
        ("mosaic_gpu", "bfloat16", 64, "on cpu .*needs a Hopper GPU"),
        ("mosaic_tpu", "float16", 64, "with float16.*cast x and w to one"),
        ("mosaic_tpu", "float32", 2050, "above 2048, 2050 must be a multiple of 128"),
        ("mosaic_tpu", "float32", 64, "needs a TPU, and this is for cpu"),
    ],
)
def test_a_kernel_that_cannot_run_says_why(name, dtype, width, words):
    x, w = jnp.zeros((8, width), dtype), jnp.zeros((2, width, 64), dtype)
    with pytest.raises(ValueError, match=words):
        grouped_matmul(x, w, jnp.array([4, 4], "int32"), implementation=name)
