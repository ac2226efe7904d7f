"""What the tests of routers share: scores, and whatever else a router names."""

import functools
import inspect

import jax
import jax.numpy as jnp

from sparsejax.moe import ROUTERS, Routing
from sparsejax.moe.routers import accepts

TOKENS, EXPERTS, BATCH, IDS = 24, 8, 4, 50


def logits_of(seed, spread=2.0, tokens=TOKENS):
    return spread * jax.random.normal(jax.random.key(seed), (tokens, EXPERTS))


def ids_of(seed):
    return jax.random.randint(jax.random.key(seed), (TOKENS,), 0, IDS, jnp.int32)


def choices(name):
    """Two experts, or one where a router is for one."""
    return 1 if inspect.signature(ROUTERS[name]).parameters["k"].default == 1 else 2


def context(name, **more):
    """All that a router names, but for the random key, the bias and the padding."""
    known = {
        "tokens": ids_of(0),
        "previous": ids_of(1),
        "positions": jnp.arange(TOKENS, dtype=jnp.int32) % (TOKENS // BATCH),
        "batch": BATCH,
        "noise": logits_of(7, 0.1),
        "gain": jnp.ones(EXPERTS),
        "penalty": jnp.asarray(0.1),
        "table": jnp.arange(IDS, dtype=jnp.int32) % EXPERTS,
    } | more
    return {n: known[n] for n in accepts(ROUTERS[name]) & known.keys()}


@functools.partial(jax.jit, static_argnums=0)
def _route(name, scores, arrays):
    static = {"batch": BATCH} if "batch" in accepts(ROUTERS[name]) else {}
    return ROUTERS[name](scores, k=choices(name), **arrays, **static)


def route(name, scores, **more):
    """Call a router with everything it names."""
    arrays = context(name, **more)
    arrays.pop("batch", None)
    return _route(name, scores, arrays)


def padded(routing, slots):
    """The choice alone, with unused slots up to so many a token."""
    room = ((0, 0), (0, max(0, slots - routing.weights.shape[1])))
    chosen, weights = (jnp.pad(a, room) for a in (routing.experts, routing.weights))
    return Routing(chosen, weights, routing.probs, {})


def compiled(function):
    """The function as one program: called eagerly, each of its operations is one."""
    static = [
        name
        for name, p in inspect.signature(function).parameters.items()
        if name in ("k", "batch", "chunk") or isinstance(p.default, int | float | str)
    ]
    return jax.jit(function, static_argnames=static)


def dense(routing):
    """Weights as a matrix of tokens by experts."""
    one_hot = jax.nn.one_hot(routing.experts, routing.probs.shape[1])
    return jnp.einsum("nk,nke->ne", routing.weights, one_hot)
