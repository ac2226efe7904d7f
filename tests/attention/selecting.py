"""What the tests of selectors share: a small layer, and budgets for every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.attention import METHODS, SELECTORS, Attention, AttentionConfig, Sizes
from sparsejax.attention.selectors.misa import MISAOptions
from sparsejax.attention.selectors.nsa import NSAOptions

T, WIDTH, HEADS, KV_HEADS, BLOCK = 24, 16, 4, 2, 4
SIZES = Sizes(WIDTH, HEADS, KV_HEADS, WIDTH // HEADS)
CLOSE = {"rtol": 2e-5, "atol": 5e-6}  # float32, sums over some hundred products

# Arguments that leave something out at these sizes, and arguments that do not.
INDEXER = {"heads": 3, "width": 6, "rotated": 4}
BRANCHES = {"first": 1, "near": 1, "length": 4, "stride": 2, "window": 6}
ROUTED = INDEXER | {"routed": 2, "block": BLOCK}
SOME = {
    "biformer": {"top": 2},
    "llsa": {"block": 2, "top": 3, "levels": 2},
    "dma": {"top": 7},
    "misa": ROUTED | {"top": 7},
    "persistent_memory": {"slots": 3},
    "dsa": INDEXER | {"top": 7},
    "moba": {"top": 3},
    "nsa": BRANCHES | {"top": 3},
    "routing": {"clusters": 3, "top": 4, "local": 1},
}
ALL = {
    "biformer": {"top": 6},
    "llsa": {"block": 2, "top": 12, "levels": 1, "enriched": False},
    "dma": {"top": T},
    "misa": ROUTED | {"top": T},
    "persistent_memory": {"slots": 1},
    "dsa": INDEXER | {"top": T},
    "moba": {"top": 6},
    "nsa": BRANCHES | {"top": 6},
    "routing": {"clusters": 1, "top": T},
}
ONE = {
    "biformer": {"top": 1},
    "llsa": {"block": 2, "top": 1, "levels": 1},
    "dma": {"top": 1},
    "misa": ROUTED | {"top": 1},
    "persistent_memory": {"slots": 1},
    "dsa": INDEXER | {"top": 1},
    "moba": {"top": 1},
    "nsa": BRANCHES | {"first": 0, "top": 1},
    "routing": {"top": 1},
}


def gated(model, *gates):
    """The model with constant gates for its branches."""
    mixer = model.mixer
    mixer.gate[...] = jnp.zeros_like(mixer.gate[...])
    bias = jnp.array([1e9 if gate else -1e9 for gate in gates])
    mixer.gate_bias[...] = jnp.broadcast_to(bias, mixer.gate_bias.shape)
    return model


def unconvolved(model):
    """The model without the convolution over values."""
    model.mixer.taps[...] = jnp.zeros_like(model.mixer.taps[...])
    return model


# What has to be set, besides the budget, for a method to be dense attention.
DENSE = {"nsa": lambda model: gated(model, 0, 1, 0), "biformer": unconvolved}
CAUSAL = sorted(name for name, method in METHODS.items() if method.causal)


def config(name, selection=None, **changes):
    given = {"selector": name, "causal": name is None or METHODS[name].causal}
    given["selection"] = SOME.get(name, {}) if selection is None else selection
    return AttentionConfig(**given | {"block_q": BLOCK, "block_kv": BLOCK} | changes)


def layer(name, selection=None, **changes):
    cfg = config(name, selection, **changes)
    return Attention(cfg, WIDTH, HEADS, KV_HEADS, init_scale=0.5, rngs=nnx.Rngs(0))


def positions(b, t=T):
    return jnp.broadcast_to(jnp.arange(t, dtype="int32")[None], (b, t))


@nnx.jit
def run(model, x, positions, segments=None, cache=None):
    return model(x, positions=positions, segments=segments, cache=cache)


def value(model, x, where=None, segments=None):
    where = positions(*x.shape[:2]) if where is None else where
    return run(model, x, where, segments)[0].value


def with_weights_of(model, other):
    """The same layer with another's parameters wherever it has them."""
    flat = dict(nnx.to_flat_state(nnx.state(other)))
    mine = nnx.to_flat_state(nnx.state(model))
    nnx.update(model, nnx.from_flat_state([(p, flat.get(p, x)) for p, x in mine]))
    return model


CHOOSING = sorted(set(METHODS) - {"persistent_memory"})


# Pure selectors, called by themselves.


def call_moba(q, k, *, top=2, **changes):
    return SELECTORS["moba"](q, k, block_kv=BLOCK, top=top, **changes)


def call_nsa(q, k, *, top=3, **changes):
    options = NSAOptions(**BRANCHES | {"top": top})
    pooled = jnp.stack([k[:, m : m + 4].mean(1) for m in range(0, T - 3, 2)], 1)
    seen = np.arange(11)[None] * 2 + 3 <= np.arange(T)[:, None]
    heads = pooled.repeat(2, axis=2)
    logits = jnp.einsum("bthc,bmhc->bhtm", q, heads) * q.shape[-1] ** -0.5
    lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), -1)
    sizes = {"kv_len": T, "block_kv": BLOCK}
    return SELECTORS["nsa"](q, pooled, lse=lse, **sizes, options=options, **changes)


def indexer(q, k):
    """Queries, keys and weights of an indexer with two heads, from those of a layer."""
    pairs = q.reshape(*q.shape[:2], 2, 2, -1).sum(3), k.sum(2, keepdims=True)
    return *pairs, jnp.ones((*q.shape[:2], 2))


def call_dsa(q, k, *, top=6, **changes):
    q, k, weights = indexer(q, k)
    return SELECTORS["dsa"](q, k, weights=weights, top=top, **changes)


def call_misa(q, k, *, top=6, routed=1, candidates=None, **changes):
    q, k, weights = indexer(q, k)
    sizes = {"heads": 2, "width": 8, "rotated": 0, "block": BLOCK}
    budgets = {"top": top, "routed": routed, "candidates": candidates}
    options = MISAOptions(**sizes, **budgets)
    return SELECTORS["misa"](q, k, weights=weights, options=options, **changes)


def call_biformer(q, k, *, top=2, **changes):
    return SELECTORS["biformer"](q, k, block_kv=BLOCK, top=top, **changes)


def call_dma(q, k, *, top=6, **changes):
    bias = k.sum(-1).mT
    return SELECTORS["dma"](q, k, bias=bias, top=top, **changes)


def call_routing(q, k, *, top=6, **changes):
    centroids = jax.random.normal(jax.random.key(7), (1, 3, q.shape[-1]))
    centroids = centroids.repeat(k.shape[2], axis=0)
    return SELECTORS["routing"](q, k, centroids=centroids, top=top, **changes)


CALLS = {
    "biformer": call_biformer,
    "dma": call_dma,
    "misa": call_misa,
    "dsa": call_dsa,
    "moba": call_moba,
    "nsa": call_nsa,
    "routing": call_routing,
}


def arrays(key, *, b=2, t=T, s=T, h=4, g=2, c=8):
    keys = jax.random.split(key, 3)
    shapes = (b, t, h, c), (b, s, g, c), (b, s, g, c)
    return [jax.random.normal(k, x) for k, x in zip(keys, shapes, strict=True)]


def selected(name, q, k, **changes):
    return jax.jit(functools.partial(CALLS[name], **changes))(q, k)
