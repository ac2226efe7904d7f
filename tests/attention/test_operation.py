"""Block-sparse attention: the fast path equals the definition, gradients included."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import (
    Attended,
    BlockMask,
    Pattern,
    Segments,
    block_sparse_attention,
    block_sparse_attention_and_lse,
    causal,
    fixed,
    full,
    gathered,
    key_major,
    sliding_window,
    strided,
    walked,
)
from sparsejax.attention.patterns import Cover, Span

# The package's attribute of that name is the function.
xla = importlib.import_module("sparsejax.attention.xla")

SIZES = {"q_len": 22, "kv_len": 29, "block_q": 4, "block_kv": 8}
# Softmax of 29 float32 logits and its gradients: sums of some hundred rounded products.
CLOSE = {"rtol": 2e-5, "atol": 5e-6}


def some_dense(*lead):
    live = np.random.default_rng(0).random((*lead, 22, 29)) < 0.15
    live[..., 4:8, :16] = True  # full blocks
    live[..., 9, :] = False  # an empty row in a live block
    live[..., 12:16, :] = False  # an empty block row
    live[..., :, 16:24] = False  # an empty block column
    return live


def chosen(*lead, width):
    """Some of the last axis' blocks, in any order, for each of the other axes."""
    random = np.random.default_rng(1)
    ids = random.random(lead).argsort(-1)[..., :width].astype("int32")
    return ids, random.integers(0, width + 1, lead[:-1]).astype("int32")


LISTS = SIZES | {"block_q": 1}
MASKS = {
    "causal": lambda: BlockMask.from_pattern(causal(), **SIZES, q_offset=7),
    "window": lambda: BlockMask.from_pattern(sliding_window(6), **SIZES),
    "full": lambda: BlockMask.from_pattern(full(), **SIZES),
    "heads": lambda: BlockMask.from_pattern(
        (fixed(8, 2), strided(5), sliding_window(3), causal()), **SIZES, q_offset=7
    ),
    "dense": lambda: BlockMask.from_dense(some_dense(), block_q=4, block_kv=8),
    "dense_heads": lambda: BlockMask.from_dense(some_dense(4), block_q=4, block_kv=8),
    "dense_batch": lambda: BlockMask.from_dense(
        some_dense(2, 1), block_q=4, block_kv=8
    ),
    "dense_all": lambda: BlockMask.from_dense(some_dense(2, 4), block_q=4, block_kv=8),
    "coarse": lambda: MASKS["lists"]().coarsened(4),
    "lists": lambda: BlockMask.from_blocks(
        *chosen(2, 4, 22, 4, width=3), **LISTS, pattern=causal(), q_offset=7
    ),
    "tokens": lambda: BlockMask.from_blocks(
        *chosen(2, 1, 22, 29, width=9), **LISTS | {"block_kv": 1}, pattern=causal()
    ),
    "coarse_tokens": lambda: MASKS["tokens"]().coarsened(4, block_kv=8),
    "blocks": lambda: BlockMask.from_blocks(
        np.tile(np.array([2, 0], "int32"), (1, 1, 6, 1)),
        np.array([[[0, 1, 2, 2, 1, 2]]], "int32"),
        **SIZES,
    ),
}


def arrays(key, *, b=2, t=22, s=29, h=4, g=2, c=8, dtype="float32"):
    keys = jax.random.split(key, 3)
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


def dense(q, k, v, mask):
    """Attention as one would write it without a kernel, in the inputs' dtype."""
    k, v = (x.repeat(q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bthc,bshc->bhts", q * q.shape[-1] ** -0.5, k)
    logits = jnp.where(mask.to_dense(), logits, -jnp.inf)
    weights = jax.nn.softmax(logits)
    values = jnp.einsum("bhts,bshc->bthc", weights, v)
    return Attended(values, jax.nn.logsumexp(logits, -1).astype("float32"))


def both(q, k, v, mask, *, segments=None, implementation, **kwargs):
    """Attended, and gradients by q, k, v, the sinks and the bias."""
    learned = {n: kwargs.pop(n) for n in ("sinks", "bias") if n in kwargs}

    @jax.jit
    def run(q, k, v, learned, mask, segments):
        def loss(q, k, v, learned):
            if implementation == "dense":
                attended = dense(q, k, v, mask)
                return weigh(attended), attended
            attended = block_sparse_attention_and_lse(
                q,
                k,
                v,
                mask,
                segments=segments,
                implementation=implementation,
                **learned,
                **kwargs,
            )
            return weigh(attended), attended

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, learned)

    gradients, attended = run(q, k, v, learned, mask, segments)
    return attended, gradients


def assert_equal_trees(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def packed(length, *cuts):
    return jnp.searchsorted(jnp.array(cuts), jnp.arange(length), side="right").astype(
        "int32"
    )


SEGMENTS = Segments(
    jnp.stack([packed(22, 3, 9, 20), packed(22, 0, 22, 22)]),
    jnp.stack([packed(29, 5, 11, 25), packed(29, 0, 30, 30)]),
)


PATHS = {
    "rows": (walked.forward, walked.backward),
    "key_major": (key_major.forward, key_major.backward),
    "gathered": (gathered.forward, gathered.backward),
}


@pytest.fixture(params=sorted(PATHS))
def path(request, monkeypatch):
    """Take one path for every mask, whatever suits it best."""
    monkeypatch.setattr(xla, "path", lambda _: PATHS[request.param])
    monkeypatch.setattr(xla, "suited", lambda mask: mask)
    return request.param


def extras(key):
    return {
        "scale": 0.7,
        "softcap": 2.0,
        "segments": SEGMENTS,
        "sinks": jnp.linspace(-1, 1, 4),
        "bias": jax.random.normal(key, (2, 2, 29)),
    }


@functools.cache
def by_definition(name, key, *, more=False, **heads):
    """What all paths have to give: arrays, keywords, and the answer to them."""
    x = arrays(jax.random.key(key), **heads)
    kwargs = extras(jax.random.key(key)) if more else {}
    mask = MASKS[name]()
    return x, kwargs, both(*x, mask, implementation="reference", **kwargs)


EXTRAS = {"causal", "heads", "dense_batch", "coarse", "lists", "tokens"}


@pytest.mark.few(6)
@pytest.mark.parametrize("name", sorted({*MASKS} - EXTRAS | {"causal"}))
def test_xla_equals_the_reference(name, path):
    x, _, expected = by_definition(name, 0)
    assert_equal_trees(both(*x, MASKS[name](), implementation="xla"), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_xla_equals_the_reference_with_all_extras(name, path):
    x, more, expected = by_definition(name, 1, more=True)
    assert_equal_trees(both(*x, MASKS[name](), implementation="xla", **more), expected)


@pytest.mark.few(2)
@pytest.mark.parametrize(("h", "g"), [(4, 1), (6, 3)])
@pytest.mark.parametrize("shared", [True, False])
def test_grouped_heads_read_their_own_keys(h, g, shared, path):
    x, _, expected = by_definition("causal", 2, h=h, g=g)
    rule = causal() if shared else (causal(),) * h
    mask = BlockMask.from_pattern(rule, **SIZES, q_offset=7)
    assert_equal_trees(both(*x, mask, implementation="xla"), expected)


def test_the_reference_equals_dense_attention_of_jax(key):
    q, k, v = arrays(key, t=29)
    mask = BlockMask.from_pattern(causal(), **SIZES | {"q_len": 29})
    found = both(q, k, v, mask, implementation="reference")[0].values
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_sink_is_one_more_key_of_value_zero(implementation, key):
    q, k, v = arrays(key, g=4)
    mask, sinks = MASKS["full"](), jnp.array([-2.0, 0.0, 1.0, 3.0])
    found, _ = both(q, k, v, mask, sinks=sinks, implementation=implementation)
    logits = jnp.einsum("bthc,bshc->bhts", q, k) * 8**-0.5
    column = jnp.broadcast_to(sinks[None, :, None, None], (2, 4, 22, 1))
    logits = jnp.concatenate([logits, column], -1)
    weights = jax.nn.softmax(logits)[..., :-1]
    expected = Attended(
        jnp.einsum("bhts,bshc->bthc", weights, v), jax.nn.logsumexp(logits, -1)
    )
    assert_equal_trees(found, expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_that_see_nothing_give_zero_and_receive_no_gradient(implementation, key):
    q, k, v = arrays(key)
    mask = MASKS["dense"]()
    attended, gradients = both(q, k, v, mask, implementation=implementation)
    dead = np.array([9, 12, 13, 14, 15])
    assert (attended.values[:, dead] == 0).all()
    assert (attended.lse[:, :, dead] == -np.inf).all()
    assert (gradients[0][:, dead] == 0).all()
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_a_row_that_sees_only_its_sink_gives_zero(key):
    q, k, v = arrays(key)
    mask, sinks = MASKS["dense"](), jnp.arange(4.0)
    attended, gradients = both(q, k, v, mask, sinks=sinks, implementation="xla")
    assert (attended.values[:, 9] == 0).all()
    np.testing.assert_allclose(attended.lse[0, :, 9], sinks)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_dead_blocks_are_never_read(path, key):
    q, k, v = arrays(key)
    mask = MASKS["dense"]()
    poison = jnp.zeros((1, 29, 1, 1)).at[:, 16:24].set(jnp.nan)
    clean = both(q, k, v, mask, implementation="xla")
    assert_equal_trees(
        both(q, k + poison, v + poison, mask, implementation="xla"), clean
    )


def test_ids_past_the_count_are_never_read(path, key):
    q, k, v = arrays(key)
    mask = MASKS["dense_heads"]()
    past = np.arange(mask.ids.shape[-1]) >= mask.count[..., None]
    spoiled = mask.replace(ids=np.where(past, 2**30, mask.ids).astype("int32"))
    clean = both(q, k, v, mask, implementation="xla")
    assert_equal_trees(both(q, k, v, spoiled, implementation="xla"), clean)


class Liar(Pattern):
    """Says of every block that it is full, and of every element that it is hidden."""

    least_offset = 0

    def __call__(self, i, j):
        return (i < 0) & (j < 0)

    def cover(self, rows, columns):
        some = rows.first <= rows.last
        return Cover(some | (columns.first < 0), some | (columns.first < 0))

    def reads(self, rows):
        return [Span(0 * rows.first, 0 * rows.first + 10**6)]


def test_full_blocks_never_ask_the_element_rule(path, key):
    q, k, v = arrays(key, s=32)
    mask = BlockMask.from_pattern(Liar(), **SIZES | {"kv_len": 32})
    found = jax.jit(block_sparse_attention)(q, k, v, mask)
    expected = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_offsets_and_tables_may_be_traced(key):
    q, k, v = arrays(key)

    @jax.jit
    def run(offset):
        mask = BlockMask.from_pattern(sliding_window(6), **SIZES, q_offset=offset)
        return block_sparse_attention(q, k, v, mask)

    for offset in (0, 7):
        mask = BlockMask.from_pattern(sliding_window(6), **SIZES, q_offset=offset)
        expected = block_sparse_attention(q, k, v, mask, implementation="reference")
        np.testing.assert_allclose(run(jnp.int32(offset)), expected, **CLOSE)
    assert run._cache_size() == 1


def test_documents_do_not_see_each_other(key):
    q, k, v = arrays(key, b=1, t=29, g=2)
    numbers = packed(29, 0, 10, 17)[None]
    mask = BlockMask.from_pattern(causal(), **SIZES | {"q_len": 29})
    attend = jax.jit(block_sparse_attention)
    found = attend(q, k, v, mask, segments=Segments(numbers, numbers))
    for part in (slice(0, 10), slice(10, 17), slice(17, 29)):
        inputs = [x[:, part] for x in (q, k, v)]
        alone = jax.nn.dot_product_attention(*inputs, is_causal=True)
        np.testing.assert_allclose(found[:, part], alone, **CLOSE)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["causal", "heads"])
def test_bfloat16_errs_little_more_than_dense_attention_in_bfloat16(name, key):
    exact = [x.astype("bfloat16").astype("float32") for x in arrays(key)]
    coarse = [x.astype("bfloat16") for x in exact]
    mask = MASKS[name]()
    truth, slopes = both(*exact, mask, implementation="reference")
    fast, fast_slopes = both(*coarse, mask, implementation="xla")

    rough, rough_slopes = both(*coarse, mask, implementation="dense")

    def error(found, expected):
        return jnp.square(found.astype("float32") - expected).mean() ** 0.5

    assert fast.values.dtype == "bfloat16"
    bound = 2 * error(rough.values, truth.values)
    assert error(fast.values, truth.values) <= bound
    trees = (jax.tree.leaves(x) for x in (fast_slopes, rough_slopes, slopes))
    for found, dense, expected in zip(*trees, strict=True):
        assert found.dtype == "bfloat16"
        assert error(found, expected) <= 3 * error(dense, expected)


def test_mapping_over_examples_equals_a_batch(key):
    q, k, v = arrays(key)
    mask = MASKS["heads"]()

    def one(q, k, v):
        return block_sparse_attention(q[None], k[None], v[None], mask)[0]

    batch = jax.jit(block_sparse_attention)(q, k, v, mask)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(q, k, v), batch, **CLOSE)


Q, K = jnp.zeros((2, 22, 4, 8)), jnp.zeros((2, 29, 2, 8))
NUMBERS = jnp.ones((2, 22), "int32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": jnp.zeros((2, 29, 3, 8)), "v": jnp.zeros((2, 29, 3, 8))}, "4 .* 3 key"),
        ({"q": Q.astype("bfloat16")}, "one dtype"),
        (
            {"mask": BlockMask.from_pattern(causal(), **SIZES | {"kv_len": 30})},
            "22 x 30",
        ),
        ({"mask": BlockMask.from_pattern((causal(),) * 3, **SIZES)}, r"\(1, 3\)"),
        ({"bias": jnp.zeros((2, 2, 29), "bfloat16")}, "bias bfloat16.*needs float32"),
        ({"softcap": 0.0}, "softcap=0.0: must be positive"),
        ({"implementation": "xlaa"}, "did you mean 'xla'"),
        ({"segments": Segments(NUMBERS, NUMBERS)}, "need"),
    ],
)
def test_a_call_that_does_not_fit_says_why(change, words):
    call = {"q": Q, "k": K, "v": K, "mask": MASKS["causal"]()}
    assert block_sparse_attention(**call).shape == Q.shape
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(**call | change)
