"""A small stacked network, optimisers and runs of them, to test ``sparse`` on."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax.masked import MaskedConfig, effective, sparse
from sparsejax.train.optim import OptimConfig, make_optimizer

TX = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=64),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "accumulating": optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(),
}
MUON = OptimConfig(
    learning_rate=1e-2, name="muon", schedule="constant", weight_decay=0.1
)
UP, DOWN, EXPERTS = "stacks/0/ffn/up", "stacks/0/ffn/down", "moe/up"


class Network(nnx.Module):
    """Two stacked layers and a stack of experts, beside what stays dense."""

    def __init__(self, key, dtype=jnp.float32):
        def param(name, shape, axes):
            draw = jax.random.normal(
                jax.random.fold_in(key, sum(map(ord, name))), shape
            )
            return nnx.Param((draw / shape[-2] ** 0.5).astype(dtype), axes=axes)

        self.embedding = param("embedding", (16, 8), "v d")
        self.norm = nnx.Param(jnp.ones(8, dtype), axes="d")
        self.stacks = nnx.data([{"ffn": {}}])
        self.stacks[0]["ffn"]["up"] = param("up", (2, 8, 12), "l d f")
        self.stacks[0]["ffn"]["down"] = param("down", (2, 12, 8), "l f d")
        self.moe = nnx.data({"router": param("router", (8, 3), "d e")})
        self.moe["up"] = param("experts", (3, 8, 8), "e d f")


def network(key, dtype=jnp.float32):
    """Give the parameters alone."""
    return nnx.state(Network(key, dtype), nnx.Param)


# Stacks are matrices to it only by their axes.
TX["muon"] = make_optimizer(MUON, 10, jax.eval_shape(network, jax.random.key(3)))


def loss(params, x):
    """Use every parameter."""
    ffn, x = params["stacks"][0]["ffn"], x.astype(params["norm"].dtype)
    h = x @ params["embedding"][...] * params["norm"][...][None]
    for up, down in zip(ffn["up"][...], ffn["down"][...], strict=True):
        h = h + jnp.tanh(h @ up) @ down
    weights = jax.nn.softmax(h @ params["moe"]["router"][...])
    y = jnp.einsum("nd,edf,ne->nf", h, params["moe"]["up"][...], weights)
    return jnp.mean((y - jnp.roll(x[:, :8], 1, axis=0)) ** 2)


def batch(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), step), (32, 16))


def plan(**changes):
    given = {"density": 0.25, "begin": 2, "end": 8, "every": 2, **changes}
    return MaskedConfig(**given)


def stepper(tx, config):
    """Give the wrapped optimiser, and one compiled step that counts its traces."""
    wrapped = sparse(tx, config)
    traces = []

    @jax.jit
    def step(params, state, x):
        traces.append(1)
        forward = lambda p: loss(effective(p, state, config), x)  # noqa: E731
        updates, state = wrapped.update(jax.grad(forward)(params), state, params)
        return optax.apply_updates(params, updates), state

    return wrapped, step, traces


UPDATERS = {
    "prune": plan(),
    "set": plan(updater="set", schedule="constant"),
    "rigl": plan(updater="rigl", schedule="constant", allocation="erk"),
    "ac_dc": plan(updater="select", schedule="ac_dc"),
}
PLANS = UPDATERS | {
    "coarse_to_fine": plan(
        structure="coarse_to_fine",
        structure_arguments={"m": 4, "frames": 2, "axis": "d"},
        schedule="constant",
        initial_criterion="magnitude",
        updater="select",
        estimator="straight_through",
        begin=1,
        end=5,
        every=1,
    ),
}
# Every optimiser under one updater, and every updater under one optimiser.
PAIRS = [(tx, "rigl") for tx in TX] + [("adamw", x) for x in UPDATERS if x != "rigl"]


@functools.cache
def history(tx, name):
    """Give a run of ten steps, the same for all tests."""
    return run(TX[tx], PLANS[name], network(jax.random.key(3)), 10)


def run(tx, config, params, steps, state=None, first=0):
    """Train; give parameters and state after every step."""
    wrapped, step, _ = stepper(tx, config)
    state = wrapped.init(params) if state is None else state
    history = [(params, state)]
    for index in range(first, steps):
        params, state = step(params, state, batch(index))
        history.append((params, state))
    return history
