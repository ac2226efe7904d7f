"""The dense Transformer and its step, written by hand: what the library is held to.

Plain functions of a nested dict of arrays, whose shapes say all sizes; of the library
only attention and its mask are here. The constants are those of ``configs/dense.py``.

``parameters`` holds ``embedding`` "v d", ``norm`` " d" and ``layers``, whose arrays
have a leading axis ``l``: ``attention_norm``, ``query`` "d h c", ``key`` and ``value``
"d g c", ``query_norm`` and ``key_norm`` " c", ``out`` "h c d", ``norm``, ``gate`` and
``up`` "d f", and ``down`` "f d".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax.attention import BlockMask, Segments, block_sparse_attention, causal
from sparsejax.typing import Array, Float, Int, PyTree

__all__ = ["loss_of", "make_optimizer", "make_step"]


def rms_norm(
    x: Float[Array, "*shape d"], scale: Float[Array, " d"]
) -> Float[Array, "*shape d"]:
    """Divide by the root mean square over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotated(
    x: Float[Array, "b t h c"], positions: Int[Array, "b t"]
) -> Float[Array, "b t h c"]:
    """Rotate the halves of each head by angles that grow with the position."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(
    x: Float[Array, "b t d"],
    weights: PyTree,
    positions: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    mask: BlockMask,
) -> Float[Array, "b t d"]:
    """Add attention, then a gated feed-forward."""
    y = rms_norm(x, weights["attention_norm"])
    q, k, v = (
        jnp.einsum("btd,dhc->bthc", y, weights[name])
        for name in ("query", "key", "value")
    )
    q = rotated(rms_norm(q, weights["query_norm"]), positions)
    k = rotated(rms_norm(k, weights["key_norm"]), positions)
    y = block_sparse_attention(q, k, v, mask, segments=Segments(segments, segments))
    x = x + jnp.einsum("bthc,hcd->btd", y, weights["out"])
    y = rms_norm(x, weights["norm"])
    y = jax.nn.silu(y @ weights["gate"]) * (y @ weights["up"])
    return x + y @ weights["down"]


def loss_of(parameters: PyTree, batch: PyTree, mask: BlockMask) -> Float[Array, ""]:
    """Average the nats of every token that follows another in its document.

    Args:
        parameters: as the module says.
        batch: tokens, segments and positions, "b t+1" each; segment 0 is padding.
        mask: of ``t`` tokens.
    """
    tokens, segments, positions = batch
    table = parameters["embedding"]
    x = table[tokens[:, :-1]] * table.shape[1] ** 0.5

    def layer(x: Array, weights: PyTree) -> tuple[Array, None]:
        return block(x, weights, positions[:, :-1], segments[:, :-1], mask), None

    x, _ = jax.lax.scan(layer, x, parameters["layers"])
    logits = rms_norm(x, parameters["norm"]) @ table.T
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.sum(nats * follows) / jnp.sum(follows)


def make_optimizer(
    peak: float, *, warmup: int, steps: int
) -> optax.GradientTransformation:
    """Clip, then AdamW along a cosine; norms and the embedding do not decay."""
    rate = optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, steps, end_value=0.1 * peak
    )

    def decays(parameters: PyTree) -> PyTree:
        def matrix(path: Any, _: Any) -> bool:
            return not any(word in path[-1].key for word in ("norm", "embedding"))

        return jax.tree_util.tree_map_with_path(matrix, parameters)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, weight_decay=0.1, mask=decays),
    )


def make_step(
    optimizer: optax.GradientTransformation, *, length: int, block: int
) -> Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, Float[Array, ""]]]:
    """Compile ``(parameters, opt, batch) -> (parameters, opt, loss)``; two are donated.

    Args:
        optimizer: whose state ``opt`` is.
        length: predicted tokens of a row.
        block: tokens in a block of the attention's mask.
    """
    mask = BlockMask.from_pattern(
        causal(), q_len=length, kv_len=length, block_q=block, block_kv=block
    )

    def step(parameters: PyTree, opt: PyTree, batch: PyTree) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(parameters, batch, mask)
        updates, opt = optimizer.update(grads, opt, parameters)
        return optax.apply_updates(parameters, updates), opt, loss

    return jax.jit(step, donate_argnums=(0, 1))
