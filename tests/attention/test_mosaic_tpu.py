"""The TPU kernels, evaluated on a CPU, equal attention by definition and do no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.tpu import interpreted
from sparsejax.attention import (
    Attended,
    BlockMask,
    Segments,
    block_sparse_attention,
    block_sparse_attention_and_lse,
    causal,
    fixed,
    full,
    sliding_window,
    strided,
    tpu_plan,
)
from tests.attention.test_operation import arrays, both, packed, weigh
from tests.slowly import slowly

SIZES = {"q_len": 22, "kv_len": 29, "block_q": 8, "block_kv": 8}
# As for the other implementations: logits and gradients are sums of hundreds of terms.
CLOSE = {"rtol": 2e-5, "atol": 5e-6}
DEAD = np.array([9, *range(16, 22)])


def some_dense(*lead):
    live = np.random.default_rng(0).random((*lead, 22, 29)) < 0.2
    live[..., :8, 8:16] = True  # a full block
    live[..., DEAD, :] = False  # an empty row in a live block, and an empty block row
    live[..., :, 16:24] = False  # an empty block column
    return live


def from_dense(*lead):
    return BlockMask.from_dense(some_dense(*lead), block_q=8, block_kv=8)


def chosen(*lead, width):
    """Lists of up to ``width`` of four key blocks."""
    random = np.random.default_rng(1)
    ids = random.random((*lead, 4)).argsort(-1)[..., :width].astype("int32")
    return ids, random.integers(0, width + 1, lead).astype("int32")


def spoiled(mask):
    """The same mask; what its tables hold past the counts must never be read."""
    past = np.arange(mask.ids.shape[-1]) >= np.asarray(mask.count)[..., None]
    return mask.replace(ids=np.where(past, 2**30, mask.ids).astype("int32"))


MASKS = {
    "causal": lambda: BlockMask.from_pattern(causal(), **SIZES, q_offset=7),
    "window": lambda: BlockMask.from_pattern(sliding_window(6), **SIZES),
    "heads": lambda: BlockMask.from_pattern(
        (fixed(8, 2), strided(5), sliding_window(3), full()), **SIZES, q_offset=7
    ),
    "dense": from_dense,
    "dense_heads": lambda: from_dense(4),
    "dense_batch": lambda: from_dense(2, 1),
    "blocks": lambda: spoiled(
        BlockMask.from_blocks(
            *chosen(2, 4, 3, width=3), **SIZES, pattern=causal(), q_offset=7
        )
    ),
    "uneven": lambda: BlockMask.from_pattern(
        causal(), **SIZES | {"block_q": 12, "block_kv": 15}, q_offset=7
    ),
    "grants": lambda: BlockMask.from_blocks(
        *chosen(2, 4, 22, width=3), **SIZES | {"block_q": 1}, pattern=causal()
    ).coarsened(8),
}
# One of each kind; the others are the same kernel again, compiled for seconds.
VARIED = {"blocks", "grants", "heads"}
SEGMENTS = Segments(
    jnp.stack([packed(22, 3, 9, 20), packed(22, 0, 22, 22)]),
    jnp.stack([packed(29, 5, 11, 25), packed(29, 0, 30, 30)]),
)


def run(q, k, v, mask, **kwargs):
    with interpreted():
        return jax.block_until_ready(
            both(q, k, v, mask, implementation="mosaic_tpu", **kwargs)
        )


def assert_equal_trees(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("name", slowly(sorted(MASKS), but=VARIED))
def test_the_kernels_equal_the_reference(name, key):
    q, k, v = arrays(key)
    expected = both(q, k, v, MASKS[name](), implementation="reference")
    assert_equal_trees(run(q, k, v, MASKS[name]()), expected)


@pytest.mark.parametrize("name", slowly(["causal", "heads", "grants"], but={"grants"}))
def test_the_kernels_equal_the_reference_with_all_extras(name, key):
    q, k, v = arrays(key)
    extras = {"scale": 0.7, "softcap": 2.0, "segments": SEGMENTS}
    extras["sinks"] = jnp.linspace(-1, 1, 4)
    extras["bias"] = jax.random.normal(key, (2, 2, 29)).at[0, 1, 3].set(-jnp.inf)
    expected = both(q, k, v, MASKS[name](), implementation="reference", **extras)
    assert_equal_trees(run(q, k, v, MASKS[name](), **extras), expected)


@pytest.mark.parametrize(
    ("h", "g", "patterns"), slowly([(4, 1, 1), (6, 3, 6), (2, 2, 1)], but={(6, 3, 6)})
)
def test_grouped_heads_read_their_own_keys(h, g, patterns, key):
    q, k, v = arrays(key, h=h, g=g)
    mask = BlockMask.from_pattern((causal(),) * patterns, **SIZES)
    expected = both(q, k, v, mask, implementation="reference")
    assert_equal_trees(run(q, k, v, mask), expected)


def test_heads_that_do_not_fit_into_one_block_are_walked_in_turn(key, monkeypatch):
    q, k, v = arrays(key, h=8)
    mask = MASKS["causal"]()
    expected = both(q, k, v, mask, implementation="reference")
    monkeypatch.setattr(tpu_plan, "PACKED", 16)  # two of the four heads of a group
    assert_equal_trees(run(q, k, v, mask), expected)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["causal", "blocks"])
def test_long_lists_are_walked_in_several_calls(name, key, monkeypatch):
    q, k, v = arrays(key)
    mask = MASKS[name]()
    expected = both(q, k, v, mask, implementation="reference")
    most = 9 if name == "causal" else 40
    monkeypatch.setattr(tpu_plan, "PAIRS", most)
    assert_equal_trees(run(q, k, v, mask), expected)


def test_dead_blocks_are_never_read_and_give_zero(key):
    q, k, v = arrays(key)
    mask = MASKS["dense"]()
    expected = both(q, k, v, mask, implementation="reference")
    keys = jnp.zeros((1, 29, 1, 1)).at[:, 16:24].set(jnp.nan)
    queries = jnp.zeros((1, 22, 1, 1)).at[:, 16:22].set(jnp.nan)
    found = run(q + queries, k + keys, v + keys, mask)
    assert_equal_trees(found, expected)
    attended, (dq, dk, dv, _) = found
    assert (attended.values[:, DEAD] == 0).all()
    assert (attended.lse[:, :, DEAD] == -np.inf).all()
    assert (dq[:, DEAD] == 0).all()
    assert (dk[:, 16:24] == 0).all()
    assert (dv[:, 16:24] == 0).all()


@pytest.mark.parametrize("name", slowly(["causal", "heads"], but={"heads"}))
def test_bfloat16_errs_little_more_than_dense_attention_in_bfloat16(name, key):
    exact = [x.astype("bfloat16").astype("float32") for x in arrays(key)]
    coarse = [x.astype("bfloat16") for x in exact]
    truth = both(*exact, MASKS[name](), implementation="reference")
    rough = both(*coarse, MASKS[name](), implementation="dense")
    fast = run(*coarse, MASKS[name]())

    def errors(found):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
        return np.array([jnp.std(a.astype("float32") - b) for a, b in pairs])

    assert fast[0].values.dtype == "bfloat16"
    assert (errors(fast) <= 3 * errors(rough)).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(("t", "h"), [(1, 4), (1, 2), (3, 4)])
def test_a_few_queries_read_a_long_cache(t, h, key):
    q, k, v = arrays(key, t=t, h=h, s=40)

    @jax.jit
    def decode(offset):
        mask = BlockMask.from_pattern(
            causal(), q_len=t, kv_len=40, block_q=t, block_kv=8, q_offset=offset
        )
        return [
            block_sparse_attention(q, k, v, mask, implementation=name)
            for name in ("mosaic_tpu", "reference")
        ]

    for offset in (0, 30):
        with interpreted():
            found, expected = jax.block_until_ready(decode(jnp.int32(offset)))
        np.testing.assert_allclose(found, expected, **CLOSE)
    assert decode._cache_size() == 1


def test_steps_are_the_live_blocks_and_one_for_each_empty_row(key):
    live = np.zeros((1, 1, 8, 8), bool)
    live[..., 0, :] = True  # one dense row, and one dense column
    live[..., :6, 2] = True
    mask = BlockMask.from_dense(live.repeat(8, 2).repeat(8, 3), block_q=8, block_kv=8)
    mask = mask.replace(elements=None)
    q, k, v = arrays(key, b=1, t=64, s=64, h=4, g=2)
    steps = []

    def record(token, point, _):
        steps.append(point)
        return token

    def loss(q, k, v):
        values = block_sparse_attention(q, k, v, mask, implementation="mosaic_tpu")
        return values.sum()

    with interpreted(simulated=True, grid_point_recorder=record):
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
    # Forward and dQ by query blocks, two of them empty; dK and dV by key blocks. Two
    # key heads walk the list in turn, their query heads packed into one block.
    assert len(steps) == 2 * (2 * (13 + 2) + 13)


def test_the_kernels_have_no_races(key):
    q, k, v = arrays(key, b=1, h=2, g=1)
    mask = MASKS["window"]()
    expected = both(q, k, v, mask, implementation="reference")
    with interpreted(simulated=True, detect_races=True):
        found = jax.block_until_ready(both(q, k, v, mask, implementation="mosaic_tpu"))
    assert_equal_trees(found, expected)


def test_mapping_over_examples_equals_a_batch(key):
    q, k, v = arrays(key)
    mask = MASKS["heads"]()

    def one(q, k, v):
        inputs = q[None], k[None], v[None], mask
        return block_sparse_attention(*inputs, implementation="mosaic_tpu")[0]

    with interpreted():
        found = jax.block_until_ready(jax.jit(jax.vmap(one))(q, k, v))
    expected = block_sparse_attention(q, k, v, mask, implementation="reference")
    np.testing.assert_allclose(found, expected, **CLOSE)


def on_a_mesh(mask, *, check_vma):
    """Values and log-denominators, batch and heads cut over four devices."""
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
    cut, rows = PartitionSpec("b", None, "h"), PartitionSpec("b", "h")

    def local(q, k, v):
        return block_sparse_attention_and_lse(
            q, k, v, mask, implementation="mosaic_tpu"
        )

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=cut,
        out_specs=Attended(cut, rows),
        check_vma=check_vma,
    )


# JAX's evaluation of kernels does not know which values vary over a mesh.
def test_a_mesh_gives_the_gradients_of_one_device(key):
    q, k, v = arrays(key)
    mask = MASKS["causal"]()
    expected = both(q, k, v, mask, implementation="reference")[1][:3]
    attend = on_a_mesh(mask, check_vma=False)

    def loss(q, k, v):
        return weigh(attend(q, k, v))

    with interpreted():
        found = jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
    assert_equal_trees(found, expected)


def test_what_varies_over_a_mesh_is_declared():
    attend = on_a_mesh(MASKS["causal"](), check_vma=True)

    def loss(q, k, v):
        return weigh(attend(q, k, v))

    with interpreted():
        slopes = jax.eval_shape(jax.grad(loss, (0, 1, 2)), Q, K, K)
    assert [x.shape for x in slopes] == [Q.shape, K.shape, K.shape]


Q, K = jnp.zeros((2, 22, 4, 8)), jnp.zeros((2, 29, 2, 8))


@pytest.mark.parametrize(
    ("mask", "dtype", "words"),
    [
        (MASKS["causal"], "float16", "float16: TPU kernels .* cast"),
        (
            lambda: BlockMask.from_pattern((causal(),) * 4, **SIZES | {"block_q": 4}),
            "float32",
            "block_q=4 with 1 heads .* coarsen",
        ),
        (
            lambda: BlockMask.from_pattern(
                tuple(map(sliding_window, range(1, 301))), **SIZES
            ),
            "float32",
            "300 patterns, and a TPU call tells 254 apart",
        ),
        (MASKS["causal"], "float32", "needs a TPU, and this is for cpu; .* 'xla'"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(mask, dtype, words):
    heads = max(4, mask().ids.shape[1])
    q, k = jnp.zeros((2, 22, heads, 8), dtype), K.astype(dtype)
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(q, k, k, mask(), implementation="mosaic_tpu")


def test_a_key_block_that_all_queries_read_may_be_too_much(monkeypatch):
    monkeypatch.setattr(tpu_plan, "PAIRS", 2)
    with pytest.raises(ValueError, match=r"a query block has up to 4 .* larger blocks"):
        block_sparse_attention(Q, K, K, MASKS["causal"](), implementation="mosaic_tpu")
