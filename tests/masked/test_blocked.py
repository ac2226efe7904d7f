"""Weights that multiply by live blocks: the same runs as under masks alone."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax.config import FieldError, convert, read
from sparsejax.masked import Blocked, effective, masks_of, sparse
from sparsejax.masked.blocked import live_blocks
from sparsejax.masked.plan import targets
from sparsejax.nn.blocks import GatedFeedForward
from sparsejax.nn.config import GatedConfig
from sparsejax.train.config import Config
from sparsejax.train.step import Step
from tests.masked.networks import plan
from tests.sources import ROOT

WIDTH, HIDDEN, SIDE = 16, 32, 8
GRID = WIDTH // SIDE, HIDDEN // SIDE
BLOCKS = {"structure": "block", "structure_arguments": {"tile": (SIDE, SIDE)}}
SOME = np.array([[1, 0, 0, 1], [0, 0, 0, 0]], bool)  # empty both ways
MANY = np.array([[1, 0, 1, 1], [1, 0, 1, 0]], bool)


def passes(product, x, w, dy):
    y, back = jax.vjp(product, x, w)
    return y, *back(dy)


@functools.partial(jax.jit, static_argnames="capacity")
def by_blocks(x, w, dy, live, whole, *, capacity):
    return passes(lambda x, w: x @ Blocked(w, live, whole, capacity), x, w, dy)


@jax.jit
def dense(x, w, dy):
    return passes(jnp.matmul, x, w, dy)


def operands(key, live):
    keys = jax.random.split(key, 3)
    shapes = (24, WIDTH), (WIDTH, HIDDEN), (24, HIDDEN)
    x, w, dy = map(jax.random.normal, keys, shapes)
    mask = np.kron(live, np.ones((SIDE, SIDE), bool))
    return (x, jnp.where(mask, w, 0), dy), mask


@pytest.mark.parametrize(
    ("live", "capacity", "whole"),
    [
        pytest.param(SOME, 2, None, id="few"),
        pytest.param(SOME, 8, jnp.array(False), id="room for more"),
        pytest.param(SOME, 8, jnp.array(True), id="whole gradient"),
        pytest.param(MANY, 8, jnp.array(False), id="many"),
    ],
)
def test_products_and_gradients_are_those_of_the_masked_matrix(
    key, live, capacity, whole
):
    given, mask = operands(key, live)
    found = by_blocks(*given, jnp.asarray(live), whole, capacity=capacity)
    y, dx, dw = dense(*given)
    # Where too many are live the product is dense, and tells more than is asked.
    asked = mask | (live is MANY) | (whole is not None and bool(whole))
    for a, b in zip(found, (y, dx, np.where(asked, dw, 0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_no_live_block_reads_is_not_read(key):
    (x, w, dy), _ = operands(key, SOME)
    run = functools.partial(by_blocks, capacity=2)
    clean = run(x, w, dy, jnp.asarray(SOME), None)
    x = x.at[:, SIDE:].set(jnp.nan)
    w = w.at[SIDE:].set(jnp.nan)
    y, dx, dw = run(x, w, dy, jnp.asarray(SOME), None)
    np.testing.assert_array_equal(y, clean[0])
    assert jnp.isfinite(dx).all()
    assert jnp.isfinite(dw).all()


@pytest.mark.parametrize("live", [SOME, MANY], ids=["few", "many"])
def test_blocks_of_a_mask_are_found_again(live):
    mask = np.kron(live, np.ones((SIDE, SIDE), bool))
    np.testing.assert_array_equal(live_blocks(jnp.asarray(mask), (SIDE, SIDE)), live)


RUNS = {
    "rigl": {"updater": "rigl", "moved": 0.7, "density": 0.5, "schedule": "constant"},
    "static": {
        "updater": "static",
        "schedule": "constant",
        "structure": "butterfly",
        "structure_arguments": {"block": SIDE},
        "density": 0.5,
    },
}


@functools.cache
def history(name, products):
    """Train for ten steps; give parameters and state of each, and how many traces."""
    config = plan(**{**BLOCKS, **RUNS[name]}, products=products)
    tx, traces = sparse(optax.adamw(1e-2), config), []
    keys = jax.random.split(jax.random.key(0))
    params = {
        "up": jax.random.normal(keys[0], (WIDTH, HIDDEN)) / 4,
        "down": jax.random.normal(keys[1], (HIDDEN, WIDTH)) / 6,
    }

    @jax.jit
    def step(params, state, x):
        def loss(params):
            own = effective(params, state, config)
            return jnp.mean((jnp.tanh(x @ own["up"]) @ own["down"] - x) ** 2)

        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for index in range(10):
        x = jax.random.normal(jax.random.key(index), (24, WIDTH))
        params, state = step(params, state, x)
        seen.append((params, state))
    return seen, len(traces)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_run_with_blocks_is_the_run_under_masks(name):
    for one, other in zip(
        history(name, "blocks")[0], history(name, "dense")[0], strict=True
    ):
        a, b = masks_of(one[1]), masks_of(other[1])
        for path, mask in a.items():
            np.testing.assert_array_equal(mask[...], b[path][...])
        for x, y in zip(*map(jax.tree.leaves, (one[0], other[0])), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_masks_that_move_compile_once():
    seen, traces = history("rigl", "blocks")
    masks = [masks_of(state)["up"][...] for _, state in seen]
    grown = [(b & ~a).any() for a, b in itertools.pairwise(masks)]
    assert any(grown)
    assert traces == 1


MESH = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1}


def mesh():
    kinds = (AxisType.Auto,) * len(MESH)
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=kinds)


def feed_forward(live_in, live_out):
    def run(params, x):
        def loss(params, x):
            up = Blocked(params[0], live_in, jnp.array(False), 4, "d f")
            down = Blocked(params[1], live_out, None, 4, "f d")
            return jnp.sum(jnp.sin(jnp.tanh(x @ up) @ down))

        return jax.value_and_grad(loss, (0, 1))(params, x)

    return jax.jit(run)


def test_a_sharded_feed_forward_is_that_of_one_device(key):
    keys = jax.random.split(key, 3)
    live = np.array([[1, 0, 0, 1], [0, 1, 0, 0]], bool)
    wide = np.kron(live, np.ones((SIDE, SIDE), bool))
    up = jnp.where(wide, jax.random.normal(keys[0], wide.shape), 0)
    down = jnp.where(wide.T, jax.random.normal(keys[1], wide.T.shape), 0)
    x = jax.random.normal(keys[2], (8, 3, WIDTH))
    run = feed_forward(jnp.asarray(live), jnp.asarray(live.T))
    alone = run((up, down), x)
    where = mesh()
    with jax.set_mesh(where):
        specs = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
        cut = [
            jax.device_put(w, NamedSharding(where, s))
            for w, s in zip((up, down), specs, strict=True)
        ]
        many = run(tuple(cut), x)
    for a, b in zip(*map(jax.tree.leaves, (alone, many)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_mesh_that_cuts_through_blocks_is_refused(key):
    (x, w, _), _ = operands(key, SOME)
    blocked = Blocked(w[:, :SIDE], jnp.asarray(SOME[:, :1]), None, 1, "d f")
    with (
        jax.set_mesh(mesh()),
        pytest.raises(ValueError, match="1 blocks along 'f' cannot be cut into the 2"),
    ):
        x[None] @ blocked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"products": "block"}, "products='block'.*did you mean 'blocks'"),
        ({"structure": "unstructured", "structure_arguments": {}}, "only with struct"),
        ({"estimator": "sr_ste"}, "works only with estimator 'masked', not 'sr_ste'"),
        ({"criterion": "movement"}, "works only with criterion"),
        (
            {"updater": "sparse_momentum", "schedule": "constant"},
            "works only with updater 'static' or",
        ),
    ],
)
def test_a_plan_that_has_no_blocks_to_multiply_by_is_refused(changes, message):
    with pytest.raises(FieldError, match=message):
        plan(**{**BLOCKS, "products": "blocks", **changes})


def test_a_layer_that_does_more_than_multiply_is_refused():
    config = plan(**BLOCKS, products="blocks")
    layer = GatedFeedForward(GatedConfig(hidden=HIDDEN), WIDTH, rngs=nnx.Rngs(0))
    params = nnx.state(layer, nnx.Param)
    assert sorted(targets(params, config)) == ["down", "gate", "up"]
    other = {"up": nnx.Param(params["up"][...], axes="d f")}
    with pytest.raises(ValueError, match="computes with dense products only"):
        targets(other, config)


def test_a_weight_of_blocks_only_multiplies(key):
    (x, w, _), _ = operands(key, SOME)
    blocked = Blocked(w, jnp.asarray(SOME), None, 2)
    assert blocked[...] is blocked
    np.testing.assert_allclose(np.asarray(x) @ blocked, x @ w, rtol=1e-5, atol=1e-5)
    assert (blocked.shape, blocked.dtype) == (w.shape, w.dtype)
    with pytest.raises(TypeError, match="which only multiplies"):
        blocked[0]
    cast = x.astype("bfloat16") @ blocked.astype("bfloat16")
    assert cast.dtype == "bfloat16"
    np.testing.assert_allclose(cast.astype("float32"), x @ w, rtol=0.05, atol=0.1)


def test_a_checkpoint_of_a_run_with_blocks_is_that_of_the_run_under_masks():
    values = read(ROOT / "configs" / "masked.py:blast")
    shapes = []
    for products in ("blocks", "dense"):
        values["masked"] |= {"products": products}
        step = Step(convert(Config, values), 258, np.ones(258))
        state = jax.eval_shape(step.init, jax.random.key(0))
        shapes.append(json.dumps(jax.tree.leaves(jax.tree.map(str, state))))
    assert shapes[0] == shapes[1]
