"""block_sparse_matmul: every implementation against the dense matrix, and its edges."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import gpu, tpu
from sparsejax.masked import block_sparse
from sparsejax.masked.block_sparse import BlockSparse, block_sparse_matmul
from tests.interpreters import GPU, gpu_interpreted

ROWS, GRID, BLOCK = 40, (4, 3), (16, 8)
SHAPE = (GRID[0] * BLOCK[0], GRID[1] * BLOCK[1])
CAPACITY = 9
ALL = np.ones(GRID, bool)
SOME = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]], bool)  # empty both ways
INTERPRETERS = {"mosaic_tpu": tpu.interpreted, "mosaic_gpu": gpu.interpreted}
ON_GPUS = "bfloat16", (64, 64)  # the least that those kernels take
NAMES = ["reference", "xla", "mosaic_tpu", "mosaic_gpu"]
GPU_SLOWLY = pytest.param("mosaic_gpu", marks=[gpu_interpreted, pytest.mark.slow])
runs = pytest.mark.parametrize("name", [*NAMES[:3], GPU])


def compiled(name):
    @jax.jit
    def run(x, w, dy):
        def f(x, values):
            own = BlockSparse(values, w.rows, w.columns, w.shape)
            return block_sparse_matmul(x, own, implementation=name)

        y, back = jax.vjp(f, x, w.values)
        return y, *back(dy)

    def interpreted(*given):
        with INTERPRETERS.get(name, contextlib.nullcontext)():
            return jax.block_until_ready(run(*given))

    return interpreted


RUN = {name: compiled(name) for name in NAMES}


@jax.jit
def dense(x, w, dy):
    y, back = jax.vjp(jnp.matmul, x, w)
    return y, *back(dy)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr("sparsejax.masked.block_sparse_xla.TALL", 16)
    monkeypatch.setattr("sparsejax.masked.block_sparse_tpu.TILE", 16 * 128)
    # One program with two slots: both are used again, in one tile and in the next.
    monkeypatch.setattr("pallas_kernels.gpu.device.INTERPRETED", 1)
    monkeypatch.setattr("pallas_kernels.gpu.block_sparse.SLOTS", {64: 2})


def operands(key, dtype="float32", block=BLOCK):
    keys = jax.random.split(key, 3)
    d, f = (n * side for n, side in zip(GRID, block, strict=True))
    shapes = (ROWS, d), (d, f), (ROWS, f)
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(k, s).astype(dtype) for k, s in pairs]


def for_kernel(key, name):
    return operands(key, *(ON_GPUS if name == "mosaic_gpu" else ()))


def sparse(w, live):
    return BlockSparse.from_dense(w, live, capacity=CAPACITY)


def elements(live, block=BLOCK):
    return live.repeat(block[0], 0).repeat(block[1], 1)


def assert_near(found, exact):
    if found.dtype == jnp.float32:
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
        return
    # Accumulated in float32, so one rounding of the result, 2**-9, remains.
    found, exact = (a.astype("float32") for a in (found, exact))
    assert jnp.abs(found - exact).max() <= 2**-8 * jnp.abs(exact).max()


def exactly(x, w, dy):
    return dense(*(a.astype("float32") for a in (x, w, dy)))


def assert_right(name, x, w, dy, live):
    """Agree with the dense product when everything dead is NaN."""
    mask = elements(live, [n // m for n, m in zip(w.shape, GRID, strict=True)])
    exact = exactly(x, jnp.where(mask, w, 0), dy)
    blocks = sparse(jnp.where(mask, w, jnp.nan), live)
    dead = jnp.asarray(~mask)
    x = jnp.where(dead.all(1)[None], jnp.nan, x)
    dy = jnp.where(dead.all(0)[None], jnp.nan, dy)
    y, dx, dw = RUN[name](x, blocks, dy)
    dw = BlockSparse(dw, blocks.rows, blocks.columns, w.shape).to_dense()
    wanted = exact[0], exact[1], jnp.where(mask, exact[2], 0)
    for a, b in zip((y, dx, dw), wanted, strict=True):
        assert_near(a, b)
    assert not y[:, dead.all(0)].any()
    assert not dx[:, dead.all(1)].any()


@runs
def test_empty_rows_and_columns_give_zero_and_nothing_dead_is_read(key, name):
    assert_right(name, *for_kernel(key, name), SOME)


@runs
@pytest.mark.parametrize("live", [0, 1], ids=["nothing", "one column"])
def test_few_live_blocks_are_right_with_their_gradients(key, name, live):
    assert_right(
        name, *for_kernel(key, name), ALL & np.array([False, False, bool(live)])
    )


@given(seed=st.integers(0, 100), density=st.floats(0, 1))
def test_any_blocks_agree_with_the_dense_product(seed, density):
    rng = np.random.default_rng(seed)
    live = rng.random(GRID) < density
    live.reshape(-1)[np.flatnonzero(live)[CAPACITY:]] = False
    with jax.default_device(jax.devices()[0]):
        assert_right("xla", *operands(jax.random.key(seed)), live)


@pytest.mark.parametrize("name", [*NAMES[:3], GPU_SLOWLY])
def test_all_blocks_are_the_dense_product(key, name):
    x, w, dy = for_kernel(key, name)
    every = BlockSparse.from_dense(w, ALL)
    for a, b in zip(RUN[name](x, every, dy)[:2], exactly(x, w, dy)[:2], strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("name", ["reference", "xla", GPU])
def test_entries_may_come_in_any_order_and_add_up(key, name):
    x, w, dy = for_kernel(key, name)
    blocks = sparse(w, SOME)
    order = np.array([4, 0, 8, 2, 1, 7, 3, 2, 5])
    mixed = jax.tree.map(lambda a: a[order], blocks)
    full = mixed.values.astype("float32")  # two of them are added up
    full = BlockSparse(full, mixed.rows, mixed.columns, w.shape).to_dense()
    exact = exactly(x, full, dy)
    for a, b in zip(RUN[name](x, mixed, dy)[:2], exact[:2], strict=True):
        assert_near(a, b)


def test_curvature_is_that_of_the_dense_product(key):
    x, w, dy = operands(key)
    blocks = BlockSparse.from_dense(w, ALL)

    @partial(jax.jit, static_argnums=0)
    def curved(product, x):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(product(x)) * dy))
        return jax.jvp(gradient, (x,), (jnp.cos(x),))[1]

    fast = partial(block_sparse_matmul, w=blocks, implementation="xla")
    exact = curved(lambda x: x @ w, x)
    np.testing.assert_allclose(curved(fast, x), exact, rtol=1e-4, atol=1e-3)


def test_a_dense_matrix_comes_back_as_it_was(key):
    w = operands(key)[1][:-3, :-2]
    assert jnp.array_equal(BlockSparse.from_dense(w, ALL, block=BLOCK).to_dense(), w)
    masked = sparse(w, SOME).to_dense()
    assert jnp.array_equal(masked, jnp.where(elements(SOME)[:-3, :-2], w, 0))


@pytest.mark.parametrize("name", ["reference", "xla", GPU_SLOWLY])
def test_a_matrix_that_ends_inside_a_block_is_right(key, name):
    x, w, dy = for_kernel(key, name)
    block = [n // m for n, m in zip(w.shape, GRID, strict=True)]
    x, w, dy = x[:, :-3], w[:-3, :-2], dy[:, :-2]
    blocks = sparse(w, SOME)
    y, dx, dw = RUN[name](x, blocks, dy)
    exact = exactly(x, blocks.to_dense(), dy)
    live = elements(SOME, block)[:-3, :-2]
    dw = BlockSparse(dw, blocks.rows, blocks.columns, w.shape).to_dense()
    wanted = exact[0], exact[1], jnp.where(live, exact[2], 0)
    for a, b in zip((y, dx, dw), wanted, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("rows", [0, 1, 17])
def test_few_rows_agree_with_the_reference(key, rows):
    x, w, dy = operands(key)
    given = x[:rows], sparse(w, SOME), dy[:rows]
    for a, b in zip(RUN["xla"](*given), RUN["reference"](*given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_traced_masks_compile_once(key):
    x, w, _ = operands(key)
    count = 0

    @jax.jit
    def run(x, w, live):
        nonlocal count
        count += 1
        return block_sparse_matmul(x, sparse(w, live))

    for live in (SOME, ~SOME & (np.arange(3) < 2), SOME & False):
        exact = x @ jnp.where(elements(live), w, 0)
        np.testing.assert_allclose(run(x, w, live), exact, rtol=1e-5, atol=1e-5)
    assert count == 1


@runs
def test_bfloat16_is_as_good_as_a_dense_product_in_bfloat16(key, name):
    block = ON_GPUS[1] if name == "mosaic_gpu" else BLOCK
    x, w, dy = operands(key, "bfloat16", block)
    blocks = sparse(w, SOME)
    full = [jax.tree.map(lambda a: a.astype("float32"), t) for t in (x, blocks, dy)]
    full[1] = BlockSparse(full[1].values, blocks.rows, blocks.columns, w.shape)
    for a, b in zip(RUN[name](x, blocks, dy), RUN["reference"](*full), strict=True):
        assert a.dtype == jnp.bfloat16
        assert_near(a, b)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("reference", 8),
        ("xla", 8),
        # The interpreter knows one device.
        pytest.param("mosaic_gpu", 1, marks=[gpu_interpreted, pytest.mark.slow]),
    ],
)
def test_rows_on_many_devices_give_the_sums_of_one(key, name, devices):
    x, w, dy = for_kernel(key, name)
    blocks, rows = sparse(w, SOME), PartitionSpec("data")

    def values_of(x, values, dy):
        def f(x, values):
            own = BlockSparse(values, blocks.rows, blocks.columns, w.shape)
            return block_sparse_matmul(x, own, implementation=name)

        y, back = jax.vjp(f, x, values)
        return y, *back(dy)

    whole = PartitionSpec()
    run = jax.shard_map(
        values_of,
        mesh=jax.make_mesh(
            (devices,),
            ("data",),
            axis_types=(AxisType.Auto,),
            devices=jax.devices()[:devices],
        ),
        in_specs=(rows, whole, rows),
        out_specs=(rows, rows, whole),
    )
    alone = RUN["reference"](x, blocks, dy)
    with INTERPRETERS.get(name, contextlib.nullcontext)():
        found = jax.block_until_ready(jax.jit(run)(x, blocks.values, dy))
    for a, b in zip(found, alone, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize(
    ("here", "name"), [("cpu", "xla"), ("gpu", "xla"), ("tpu", "mosaic_tpu")]
)
def test_none_takes_the_kernel_of_the_platform(here, name, monkeypatch):
    monkeypatch.setattr(block_sparse, "platform", lambda: here)
    assert block_sparse._default() == name


def test_density_counts_what_is_live(key):
    blocks = sparse(operands(key)[1], SOME)
    assert blocks.density() == 5 / 12
    assert repr(blocks) == "BlockSparse(64 x 24, 5 of 12 blocks of 16 x 8)"
    with pytest.raises(ValueError, match=r"traced ids: ask outside of jax.jit"):
        jax.jit(lambda w: w.density())(blocks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"implementation": "xlaa"}, r"'xlaa'.*did you mean 'xla'"),
        ({"x": jnp.zeros((2, 8))}, r"x float32\(2, 8\).*the width and the dtype"),
        ({"x": jnp.zeros((2, 64), "bfloat16")}, r"cast the weight's values to x.dtype"),
        (
            {"rows": np.full(CAPACITY, 4)},
            r"rows up to 4: a matrix of \(64, 24\).*has 4",
        ),
        ({"columns": np.zeros(3, int)}, r"one entry for each of the 9 blocks"),
        ({"implementation": "mosaic_tpu"}, "needs a TPU, and this is for cpu"),
    ],
)
def test_what_does_not_fit_is_named(key, change, words):
    x, w, _ = operands(key)
    blocks = sparse(w, SOME)
    parts = {"rows": blocks.rows, "columns": blocks.columns} | change
    # Not through the class, whose own types would speak first.
    own = jax.tree.unflatten(
        jax.tree.structure(blocks), [blocks.values, parts["rows"], parts["columns"]]
    )
    with pytest.raises(ValueError, match=words):
        block_sparse_matmul(
            parts.get("x", x), own, implementation=parts.get("implementation")
        )


@pytest.mark.parametrize(
    ("live", "capacity", "words"),
    [
        (ALL[:2], None, r"\(2, 3\): a matrix of \(64, 24\) has \(4, 3\) blocks"),
        (ALL, 3, "capacity=3: 12 blocks are live; raise it"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(key, live, capacity, words):
    with pytest.raises(ValueError, match=words):
        BlockSparse.from_dense(operands(key)[1], live, block=BLOCK, capacity=capacity)


def test_a_traced_mask_without_a_capacity_is_refused(key):
    w = operands(key)[1]
    with pytest.raises(ValueError, match=r"capacity=None.*give the largest number"):
        jax.jit(lambda live: BlockSparse.from_dense(w, live).values)(ALL)


@pytest.mark.parametrize(
    ("name", "dtype", "side", "words"),
    [
        ("mosaic_tpu", "float16", 8, "with float16.*cast x and the weight to one"),
        ("mosaic_tpu", "float32", 2048, r"blocks of \(2048, 2048\).*into smaller"),
        ("mosaic_gpu", "float32", 64, "with float32.*cast x and the weight, or use"),
        ("mosaic_gpu", "bfloat16", 96, r"blocks of \(96, 96\).*multiples of 64; cut"),
        ("mosaic_gpu", "bfloat16", 64, "on cpu .*needs a Hopper GPU"),
    ],
)
def test_a_kernel_that_cannot_run_says_why(name, dtype, side, words):
    w = BlockSparse.from_dense(jnp.zeros((side, side), dtype), np.ones((1, 1), bool))
    with pytest.raises(ValueError, match=words):
        block_sparse_matmul(jnp.zeros((8, side), dtype), w, implementation=name)
