"""One compiled program for each way over a mesh; it takes any routing.

Routers and hard cases then cost no compilation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from sparsejax.moe import ROUTERS, GatedExperts, MoEConfig
from sparsejax.moe.mixture import mixed
from sparsejax.partition import MESH_AXES
from tests.moe.routed import choices, context, padded

BATCH, LENGTH, EXPERTS, WIDTH, HIDDEN, K = 8, 4, 8, 8, 6, 2
TOKENS = BATCH * LENGTH
ONE = (1, 1, 1, 1, 1)
# A token may visit any number of experts: such a routing needs programs of its own.
WIDE = {"block_ffn", "expert_choice", "expert_choice_by_position", "remoe"}
NARROW = sorted(ROUTERS.keys() - WIDE)
MESHES = {n: (8 // n, 1, n, 1, 1) for n in (1, 2, 4, 8)}


@functools.cache
def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    normal = jax.random.normal
    experts = GatedExperts(
        normal(keys[0], (EXPERTS, WIDTH, HIDDEN)) * WIDTH**-0.5,
        normal(keys[1], (EXPERTS, WIDTH, HIDDEN)) * WIDTH**-0.5,
        normal(keys[2], (EXPERTS, HIDDEN, WIDTH)) * HIDDEN**-0.5,
    )
    x = normal(keys[3], (BATCH, LENGTH, WIDTH))
    return x, normal(keys[4], (TOKENS, EXPERTS)), experts


def mesh_of(shape):
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds)


@functools.cache
def program(exchange, shape, dispatcher="dense", **settings):
    """Values, causes and gradients of one way over one mesh, for any routing."""
    config = MoEConfig(
        experts=EXPERTS,
        per_token=K,
        hidden=HIDDEN,
        exchange=exchange,
        dispatcher=dispatcher,
        **settings,
    )

    @jax.jit
    def run(x, routing, experts):
        def total(x, weights, experts):
            out = mixed(x, routing._replace(weights=weights), experts, config)
            target = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
            return (out.values * target).sum(), (out.values, out.causes)

        grad = jax.grad(total, (0, 1, 2), has_aux=True)
        grads, (values, causes) = grad(x, routing.weights, experts)
        return values, grads, causes

    def on_mesh(*operands):
        with jax.set_mesh(mesh_of(shape)):
            return jax.device_get(run(*operands))

    on_mesh.run = run
    return on_mesh


def oracle(x, routing, experts):
    return program("ring", ONE, "dense")(x, routing, experts)


def assert_close(a, b, tolerance=2e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@functools.cache
def routed(router):
    """A router's choice for the same logits, as two slots a token at least."""
    _, logits, _ = problem()
    number = jnp.arange(TOKENS, dtype=jnp.int32)
    given = context(
        router,
        tokens=number % 11,
        previous=(number + 1) % 11,
        positions=number % LENGTH,
        batch=BATCH,
        noise=jnp.ones_like(logits),
        valid=jnp.ones(TOKENS, bool),
        key=jax.random.key(1),
    )
    return padded(ROUTERS[router](logits, k=choices(router), **given), K)
