"""Experts of every make: applied in groups or batches, they are the written formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.config import FieldError
from sparsejax.moe import HIDDEN, GatedExperts, MoE, MoEConfig
from sparsejax.moe.experts import batched, clamped_swiglu, grouped, squared_relu

E, D, F = 3, 8, 6
SIZES = jnp.asarray([4, 0, 3], jnp.int32)


def stack(*, gated=True, biases=True):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(E, D, F), (E, D, F), (E, F, D), (E, F), (E, F), (E, D)]
    weights = [jax.random.normal(*a) for a in zip(keys, shapes, strict=True)]
    for n in (0, 3) if not gated else ():
        weights[n] = None
    return GatedExperts(*weights[: 6 if biases else 3])


def formula(name, experts, e, row):
    """One row through one expert, in float64."""
    w = [None if a is None else np.float64(a[e]) for a in experts]
    gate = None if w[0] is None else row @ w[0] + (0 if w[3] is None else w[3])
    up = row @ w[1] + (0 if w[4] is None else w[4])
    if name == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    elif gate is None:
        hidden = np.maximum(up, 0) ** 2
    else:
        hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ w[2] + (0 if w[5] is None else w[5])


MAKES = [
    ("silu", {"biases": False}),
    ("clamped_swiglu", {}),
    ("squared_relu", {"gated": False, "biases": False}),
    ("squared_relu", {"gated": False}),
]


@pytest.mark.parametrize(("name", "make"), MAKES)
def test_experts_are_the_written_formula(name, make):
    """Nine rows: four, none and three of the experts', and two of nobody's."""
    experts, x = stack(**make), 3 * jax.random.normal(jax.random.key(1), (9, D))
    y = grouped(x, experts, SIZES, activation=HIDDEN[name])
    of = [0] * 4 + [2] * 3
    expected = [formula(name, experts, e, np.float64(x[n])) for n, e in enumerate(of)]
    np.testing.assert_allclose(y[:7], np.array(expected), rtol=2e-4, atol=1e-3)
    assert not y[7:].any()
    same = jnp.broadcast_to(x[None, :4], (E, 4, D))
    y = batched(same, experts, activation=HIDDEN[name])
    expected = [
        [formula(name, experts, e, np.float64(r)) for r in x[:4]] for e in range(E)
    ]
    np.testing.assert_allclose(y, np.array(expected), rtol=2e-4, atol=1e-3)


def test_bfloat16_biases_get_the_sum_over_many_rows():
    n, sizes = 4096, jnp.asarray([3000, 96, 1000], jnp.int32)
    x = jax.random.normal(jax.random.key(3), (n, D))

    def slopes(dtype):
        experts = jax.tree.map(lambda w: w.astype(dtype), stack())

        def loss(experts):
            y = grouped(x.astype(dtype), experts, sizes, activation=HIDDEN["silu"])
            return y.astype("float32").sum()

        return jax.grad(loss)(experts)

    found, exact = (slopes(dtype).down_bias for dtype in ("bfloat16", "float32"))
    np.testing.assert_allclose(found.astype("float32"), exact, rtol=0.01)


def test_an_expert_without_rows_gets_no_gradient():
    x = jax.random.normal(jax.random.key(1), (9, D)).at[7:].set(jnp.nan)

    def total(experts):
        y = grouped(x, experts, SIZES, activation=HIDDEN["clamped_swiglu"])
        return jnp.square(y[:7]).sum()

    gradient = jax.jit(jax.grad(total))(stack())
    for weight in gradient:
        assert not weight[1].any()
        assert jnp.isfinite(weight).all()
        assert weight[0].any()


def test_fine_grained_experts_that_all_answer_are_the_expert_they_were_cut_from():
    experts = stack(biases=False)
    whole = GatedExperts(*(w[:1] for w in experts[:3]))
    cut = GatedExperts(
        *(w[0].reshape(D, 3, F // 3).swapaxes(0, 1) for w in experts[:2]),
        experts.down[0].reshape(3, F // 3, D),
    )
    x = jax.random.normal(jax.random.key(1), (1, 5, D))
    a = batched(x, whole, activation=HIDDEN["silu"])[0]
    b = batched(jnp.tile(x, (3, 1, 1)), cut, activation=HIDDEN["silu"]).sum(axis=0)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_squared_relu_is_the_square_of_what_is_positive():
    hidden = squared_relu(jnp.asarray([[-3.0, 0, 0.5, 2]]))
    np.testing.assert_array_equal(hidden, [[0, 0, 0.25, 4]])


def test_clamped_swiglu_lets_nothing_exceed_seven():
    wide = jnp.asarray([-100.0, 0, 100])
    np.testing.assert_allclose(clamped_swiglu(wide, wide), [0, 0, 8 * 7], atol=1e-3)
    np.testing.assert_array_equal(squared_relu(wide), [0, 0, 1e4])
    with pytest.raises(ValueError, match="gate=None: clamped_swiglu"):
        clamped_swiglu(None, wide)


def test_a_layer_has_the_weights_of_its_experts_make():
    def names(**make):
        config = MoEConfig(experts=4, per_token=2, hidden=6, shared=4, **make)
        layer = MoE(config, D, rngs=nnx.Rngs(0))
        out = nnx.jit(layer)(jax.random.normal(jax.random.key(0), (2, 4, D)))
        assert jnp.isfinite(out.value).all()
        return {key for key in nnx.to_pure_dict(nnx.state(layer)) if key != "router"}

    plain = {"up", "down", "shared_up", "shared_down"}
    assert names(gated=False, activation="squared_relu") == plain
    biases = {"gate_bias", "up_bias", "down_bias"}
    gates = {"gate", "shared_gate"}
    found = names(biases=True, activation="clamped_swiglu")
    assert found == plain | biases | gates
    with pytest.raises(FieldError, match="activation='clamped_swiglu': multiplies by"):
        names(gated=False, activation="clamped_swiglu")
