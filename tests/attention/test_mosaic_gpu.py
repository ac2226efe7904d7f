"""The Hopper kernels, interpreted on a CPU, against attention by definition."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from sparsejax.attention import causal, mosaic_gpu, operation, sliding_window
from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.operation import block_sparse_attention_and_lse
from tests.interpreters import DEADLINE, gpu_interpreted
from tests.slowly import slowly

pytestmark = DEADLINE

# Root mean square error as part of the result's size: a few roundings to float16.
VALUES, GRADIENTS = 1e-3, 2e-3


def pattern_mask(pattern, q_len, kv_len, block_q, block_kv, **kwargs):
    sizes = {"q_len": q_len, "kv_len": kv_len}
    return BlockMask.from_pattern(
        pattern, **sizes, block_q=block_q, block_kv=block_kv, **kwargs
    )


def some_dense(*lead):
    """Dead queries 70..79 and, in key blocks, everything but two of three dead."""
    rule = np.random.default_rng(0).random((*lead, 128, 192)) < 0.3
    rule[..., 70:80, :] = False
    rule[..., 64:128] = False
    rule[..., 64:, :64] = False
    return rule


def few_tokens():
    """Lists of single queries over blocks of 64 keys, joined to what kernels take."""
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(5)[:3] for _ in range(128)])[None, None]
    fine = BlockMask.from_blocks(
        np.sort(ids).astype("int32"),
        np.full((1, 1, 128), 3, "int32"),
        q_len=128,
        kv_len=320,
        block_q=1,
        block_kv=64,
    )
    return fine.coarsened(64)


MASKS = {
    "causal": lambda: pattern_mask(causal(), 150, 150, 64, 64),
    "offset": lambda: pattern_mask(sliding_window(70), 100, 180, 64, 64, q_offset=60),
    "wide": lambda: pattern_mask(sliding_window(90), 256, 256, 128, 128),
    "heads": lambda: pattern_mask((causal(), sliding_window(9)) * 2, 128, 128, 64, 64),
    "dense": lambda: BlockMask.from_dense(some_dense(), block_q=64, block_kv=64),
    "dense_heads": lambda: BlockMask.from_dense(
        some_dense(2), block_q=128, block_kv=64
    ),
    "grants": few_tokens,
    "one_token": lambda: pattern_mask(causal(), 1, 1, 16, 16),
}


def arrays(key, mask, *, b=1, h=2, g=1, c=32, dtype="float16"):
    keys = jax.random.split(key, 3)
    t, s = mask.q_len, mask.kv_len
    shapes = (b, t, h, c), (b, s, g, c), (b, s, g, c)
    return [
        jax.random.normal(k, shape).astype(dtype)
        for k, shape in zip(keys, shapes, strict=True)
    ]


def weigh(attended):
    """A scalar that depends unevenly on every value and every log-denominator."""
    wave = jnp.cos(jnp.arange(attended.values.size, dtype="float32"))
    values = attended.values.astype("float32") * wave.reshape(attended.values.shape)
    seen = jnp.isfinite(attended.lse)
    return values.sum() + jnp.where(seen, jnp.sin(attended.lse), 0).sum()


def both(arrays, mask, *, implementation, bias=None, **kwargs):
    """Attended, and gradients by q, k, v and the bias."""

    @jax.jit
    def run(arrays, bias, mask):
        def loss(arrays, bias):
            attended = block_sparse_attention_and_lse(
                *arrays, mask, bias=bias, implementation=implementation, **kwargs
            )
            return weigh(attended), attended

        wanted = 0 if bias is None else (0, 1)
        return jax.grad(loss, argnums=wanted, has_aux=True)(arrays, bias)

    if implementation == "reference":
        arrays = [x.astype("float32") for x in arrays]
        gradients, attended = run(arrays, bias, mask)
    else:
        with gpu.interpreted():
            gradients, attended = run(arrays, bias, mask)
    return attended, jax.tree.leaves(gradients)


def error(found, expected):
    seen = np.isfinite(expected)
    found = np.asarray(found.astype("float32"))
    np.testing.assert_array_equal(found[~seen], expected[~seen])
    miss = np.where(seen, found - expected, 0)
    size = np.square(np.where(seen, expected, 0)).mean() ** 0.5
    return np.square(miss).mean() ** 0.5 / max(size, 1e-3)


def assert_near(found, expected):
    attended, gradients = found
    for a, b in zip(attended, expected[0], strict=True):
        assert error(a, b) < VALUES
    for a, b in zip(gradients, expected[1], strict=True):
        assert error(a, b) < GRADIENTS


@gpu_interpreted
@pytest.mark.parametrize(
    "name",
    slowly(
        ["causal", "dense_heads", "grants", "one_token", "wide"],
        but={"grants"},
    ),
)
def test_gradients_equal_the_reference(name, key):
    mask = MASKS[name]()
    x = arrays(key, mask)
    found = both(x, mask, implementation="mosaic_gpu")
    assert_near(found, both(x, mask, implementation="reference"))


def packed(length, *cuts):
    return jnp.searchsorted(jnp.array(cuts), jnp.arange(length), side="right").astype(
        "int32"
    )


@gpu_interpreted
def test_gradients_equal_the_reference_with_all_extras(key):
    numbers = jnp.stack([packed(100, 3, 80), packed(100, 0, 90)])
    extras = {"scale": -0.3, "softcap": 2.0, "segments": Segments(numbers, numbers)}
    mask = pattern_mask(causal(), 100, 100, 64, 64)
    x = arrays(key, mask, b=2, c=24)
    bias = jax.random.normal(key, (2, 1, 100)).at[0, 0, 7].set(-jnp.inf)
    found = both(x, mask, bias=bias, implementation="mosaic_gpu", **extras)
    expected = both(x, mask, bias=bias, implementation="reference", **extras)
    assert_near(found, expected)


def attend(arrays, mask, implementation, **kwargs):
    run = jax.jit(
        lambda arrays, mask: block_sparse_attention_and_lse(
            *arrays, mask, implementation=implementation, **kwargs
        )
    )
    if implementation == "reference":
        return run([x.astype("float32") for x in arrays], mask)
    with gpu.interpreted():
        return run(arrays, mask)


def assert_same(found, expected):
    assert_near((found, []), (expected, []))


@gpu_interpreted
@pytest.mark.parametrize("name", ["heads", "offset"])
def test_values_equal_the_reference(name, key):
    mask = MASKS[name]()
    x = arrays(key, mask, h=4, g=2)
    assert_same(attend(x, mask, "mosaic_gpu"), attend(x, mask, "reference"))


@gpu_interpreted
@pytest.mark.parametrize("width", slowly([64, 96], but={96}))
def test_heads_may_be_wide(width, key):
    mask = pattern_mask(causal(), 64, 64, 64, 64)
    x = arrays(key, mask, c=width)
    assert_same(attend(x, mask, "mosaic_gpu"), attend(x, mask, "reference"))


@pytest.mark.slow
@gpu_interpreted
def test_gradients_of_wide_heads_equal_the_reference(key):
    mask = pattern_mask(causal(), 64, 64, 64, 64)
    x = arrays(key, mask, c=128)
    found = both(x, mask, implementation="mosaic_gpu")
    assert_near(found, both(x, mask, implementation="reference"))


@gpu_interpreted
@pytest.mark.parametrize(
    "heads", [(8, 2), pytest.param((2, 2), marks=pytest.mark.slow)]
)
def test_few_queries_share_a_tile_and_split_a_long_cache(heads, key):
    h, g = heads

    @jax.jit
    def mask_at(offset):
        return pattern_mask(sliding_window(700), 2, 1000, 16, 64, q_offset=offset)

    for offset in (3, 990):
        mask = mask_at(jnp.int32(offset))
        x = arrays(key, mask, h=h, g=g)
        expected = attend(x, mask, "reference")
        assert_same(attend(x, mask, "mosaic_gpu"), expected)


@gpu_interpreted
def test_splits_of_the_keys_are_joined_where_nothing_is_seen(key):
    mask = pattern_mask(causal(), 1, 512, 16, 64)
    mask = mask.replace(count=0 * mask.count, full=0 * mask.full)
    found = attend(arrays(key, mask), mask, "mosaic_gpu")
    assert (found.values == 0).all()
    assert (found.lse == -np.inf).all()


@gpu_interpreted
def test_what_is_dead_is_neither_read_nor_changed(key):
    mask = MASKS["dense"]()
    x = arrays(key, mask)
    q, k, v = x
    poison = jnp.zeros((1, 192, 1, 1), k.dtype).at[64:128].set(jnp.nan)
    spoiled = [q, k + poison, v + poison]
    past = np.arange(mask.ids.shape[-1]) >= mask.count[..., None]
    wild = mask.replace(ids=np.where(past, 2**30, mask.ids).astype("int32"))
    found = both(spoiled, wild, implementation="mosaic_gpu")
    assert_near(found, both(x, mask, implementation="reference"))
    attended, (dq, dk, dv) = found
    assert (attended.values[:, 70:80] == 0).all()
    assert (attended.lse[:, :, 70:80] == -np.inf).all()
    assert (dq[:, 70:80] == 0).all()
    assert (dk[:, 64:128] == 0).all()
    assert (dv[:, 64:128] == 0).all()


@gpu_interpreted
def test_bfloat16_errs_as_its_rounding_does(key):
    mask = MASKS["causal"]()
    x = arrays(key, mask, dtype="bfloat16")
    found = attend(x, mask, "mosaic_gpu")
    assert found.values.dtype == "bfloat16"
    expected = attend(x, mask, "reference")
    rounding = error(expected.values.astype("bfloat16"), expected.values)
    assert error(found.values, expected.values) < 2 * rounding
    assert error(found.lse, expected.lse) < 1e-5


@gpu_interpreted
def test_mapping_over_examples_equals_a_batch(key):
    mask = pattern_mask(causal(), 64, 64, 64, 64)
    x = arrays(key, mask, b=2)

    def one(*x):
        x = [a[None] for a in x]
        found = block_sparse_attention_and_lse(*x, mask, implementation="mosaic_gpu")
        return jax.tree.map(lambda a: a[0], found)

    with gpu.interpreted():
        found = jax.jit(jax.vmap(one))(*x)
    assert_same(Attended(*found), attend(x, mask, "reference"))


@gpu_interpreted
def test_a_mesh_of_one_device_changes_nothing(key):
    mask = pattern_mask(causal(), 64, 64, 64, 64)
    x = arrays(key, mask)
    mesh = jax.make_mesh(
        (1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    batch = jax.P("data")

    def loss(*x):
        found = block_sparse_attention_and_lse(*x, mask, implementation="mosaic_gpu")
        return weigh(found)[None]

    def total(*x):
        specs = {"in_specs": (batch,) * 3, "out_specs": batch}
        return jax.shard_map(loss, mesh=mesh, **specs, check_vma=True)(*x).sum()

    with gpu.interpreted():
        found = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*x)
    expected = both(x, mask, implementation="reference")
    assert_near((expected[0], found), expected)


Q, K = jnp.zeros((1, 96, 2, 32), "float16"), jnp.zeros((1, 96, 1, 32), "float16")
FINE = pattern_mask(causal(), 96, 96, 64, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "on cpu .* needs a Hopper GPU .*interpreted"),
        ({"q": Q.astype("float32")}, "float32: .* cast q, k and v, or use 'xla'"),
        ({"q": jnp.zeros((1, 96, 2, 192), "float16")}, "heads of 192: .* spill"),
        (
            {"mask": pattern_mask(causal(), 96, 96, 16, 48)},
            r"16 x 48: .* mask.coarsened\(64, block_kv=192\)",
        ),
    ],
)
def test_a_call_that_is_not_for_the_kernels_says_why(change, words):
    call = {"q": Q, "k": K, "v": K, "mask": FINE} | change
    q = call["q"]
    call |= dict.fromkeys("kv", jnp.zeros((1, 96, 1, q.shape[3]), q.dtype))
    with pytest.raises(ValueError, match=words):
        block_sparse_attention_and_lse(**call, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("device", "dtype", "block", "name"),
    [
        ("NVIDIA H200", "bfloat16", 64, "mosaic_gpu"),
        ("NVIDIA H200", "float32", 64, "xla"),
        ("NVIDIA H200", "bfloat16", 48, "xla"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 64, "xla"),
        ("TPU v5 lite", "float32", 64, "mosaic_tpu"),
        ("cpu", "bfloat16", 64, "xla"),
    ],
)
def test_the_default_is_for_the_hardware_and_the_work(
    device, dtype, block, name, monkeypatch
):
    monkeypatch.setattr(mosaic_gpu, "HAS_MOSAIC_GPU", True)
    there = SimpleNamespace(device_kind=device)
    mesh = SimpleNamespace(empty=False, abstract_device=there)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    mask = pattern_mask(causal(), 96, 96, block, block)
    q = Q.astype(dtype)
    assert operation._by_platform(q, q, mask) == name
