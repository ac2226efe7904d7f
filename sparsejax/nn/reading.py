"""A trained model's feed-forwards, read as key-value memories.

    graph, state = nnx.split(model)
    layers = read(model, batches, top=25)

``look`` runs a model layer by layer and gives what each layer multiplied with what;
``read`` streams a text through it and sums up, for every layer, which prefixes trigger
which key, and whether its values say what came next.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.memory import PEER, ProductKeyMemory, row_products
from sparsejax.memory.peer import ACTIVATIONS
from sparsejax.memory.triggers import Triggers, agrees, composed, merged, no_triggers
from sparsejax.nn.blocks import Block, GatedFeedForward
from sparsejax.nn.decoder import layers
from sparsejax.nn.transformer import Transformer
from sparsejax.typing import Array, Bool, Float, Int, PyTree

Tokens = Int[Array | np.ndarray, "b t"]  # of batches as the data gives them

__all__ = ["Look", "Reading", "first_choices", "look", "read", "values_of"]

TILE = 1024  # vectors whose logits exist at a time: a memory has many more


class Look(NamedTuple):
    """What one layer's feed-forward did at each token."""

    coefficients: Float[Array, "b t f"]
    added: Float[Array, "b t d"]  # their sum of values, as the layer gave it
    before: Float[Array, "b t d"]  # the residual stream that it was added to
    after: Float[Array, "b t d"]


class Reading(NamedTuple):
    """One layer, read over a text. Shares are of keys, or of tokens, as named."""

    triggers: Triggers
    said: Int[Array, " f"]  # the token that each value raises most
    agreement: float  # keys whose value says what followed its best trigger
    triggered: float  # keys with any trigger
    active: float  # mean share of keys with a coefficient above 0
    composed: float  # tokens where the layer says what no active memory says
    changed: float  # tokens whose first choice the layer changes


def _scattered(
    ids: Int[Array, "n h k"], weights: Float[Array, "n h k"], slots: int
) -> Float[Array, "n m"]:
    row = jnp.arange(ids.shape[0])[:, None, None]
    return jnp.zeros((ids.shape[0], slots)).at[row, ids].add(weights)


def _gated(layer: GatedFeedForward, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
    return layer.hidden(x)


def _looked_up(
    layer: ProductKeyMemory, x: Float[Array, "b t d"]
) -> Float[Array, "b t m"]:
    ids, weights = layer.choose(x.reshape(-1, x.shape[-1]))
    found = _scattered(ids, weights, layer.config.slots)
    return found.reshape(*x.shape[:2], -1)


def _neurons(layer: PEER, x: Float[Array, "b t d"]) -> Float[Array, "b t m"]:
    rows = x.reshape(-1, x.shape[-1])
    ids, weights = layer.choose(rows)
    flat = ids.reshape(len(rows), -1)
    hidden = row_products(layer.down[...], flat, rows.astype(jnp.float32))
    hidden = ACTIVATIONS[layer.config.activation](hidden).reshape(weights.shape)
    found = _scattered(ids, hidden * weights, layer.config.slots)
    return found.reshape(*x.shape[:2], -1)


class Memory(NamedTuple):
    """How a kind of layer is read: its coefficients, and its values."""

    coefficients: Callable[[Any, Array], Array]
    values: Callable[[Any], Array]


def _written(layer: ProductKeyMemory) -> Float[Array, "m d"]:
    write = layer.write
    if write.gate is not None:
        raise ValueError(
            "memory.gate='swilu': what a slot adds depends on the token, so that its"
            " value says nothing by itself; read a memory with gate='none'"
        )
    values = layer.values[...]
    return values if write.out is None else values @ write.out[...]


MEMORIES: dict[type, Memory] = {
    GatedFeedForward: Memory(_gated, lambda layer: layer.down[...]),
    ProductKeyMemory: Memory(_looked_up, _written),
    PEER: Memory(_neurons, lambda layer: layer.up[...]),
}


def look(
    model: Transformer,
    tokens: Tokens,
    *,
    segments: Tokens | None = None,
    positions: Tokens | None = None,
) -> list[Look]:
    """Run a model and give what each layer did; it can be jitted.

    Raises:
        ValueError: for a layer that is no sum of fixed values: routed experts, pools,
            trees.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    segments = None if segments is None else jnp.asarray(segments)
    x, found = model.embed(tokens), []
    for block in layers(model):
        mixed, _ = block.attention(
            block.attention_norm(x), positions=positions, segments=segments, cache=None
        )
        before = x + mixed.value
        layer, normed = _feed_forward(block), block.norm(before)
        x = before + (added := layer(normed).value)
        coefficients = MEMORIES[type(layer)].coefficients(layer, normed)
        found.append(Look(coefficients, added, before, x))
    return found


def values_of(model: Transformer) -> list[Float[Array, "f d"]]:
    """Give each layer's values: what a coefficient of 1 adds to the residual stream.

    Raises:
        ValueError: as ``look`` does, and for memories whose values pass a gate.
    """
    found = map(_feed_forward, layers(model))
    return [MEMORIES[type(layer)].values(layer) for layer in found]


def first_choices(
    model: Transformer, vectors: Float[Array, "n d"], *, normed: bool = False
) -> Int[Array, " n"]:
    """Give the token that each vector raises most.

    Args:
        vectors: in the residual stream.
        normed: pass the model's last norm first, as the stream itself does. Its scale
            then weighs the channels.
    """

    def choice(vector: Array) -> Array:
        row = vector[None, None]
        return model.logits(model.norm(row) if normed else row).argmax()

    return jax.lax.map(choice, vectors, batch_size=TILE)


def read(
    model: Transformer,
    batches: Iterable[tuple[Tokens, Tokens, Tokens]],
    *,
    top: int = 25,
    normed: bool = False,
) -> list[Reading]:
    """Stream a text through a model and sum up what each layer's memories do.

    Args:
        batches: tokens, segments and positions, each "b t"; all of one shape. A token's
            next is the one after it in its row, if that is of the same segment.
        top: triggers kept for each key.
        normed: pass values and layers' outputs through the model's last norm before
            asking what they say.

    Raises:
        ValueError: as ``look`` does, and if there is no text.

    Source: Geva et al. 2020, arXiv:2012.14913, Sec. 3-5.
    """
    graph, state = nnx.split(model)
    values = values_of(model)
    said = [first_choices(model, v, normed=normed) for v in values]

    @jax.jit
    def step(state: PyTree, triggers: Any, start: Array, batch: Any) -> Any:
        return _step(nnx.merge(graph, state), said, triggers, start, batch, normed)

    triggers: Any = [no_triggers(len(v), top=top) for v in values]
    sums, following, start = None, [], 0
    for batch in batches:
        triggers, added, after = step(state, triggers, jnp.int32(start), batch)
        sums = added if sums is None else jax.tree.map(jnp.add, sums, added)
        following.append(np.asarray(after))
        start += after.size
    if sums is None:
        raise ValueError("batches is empty: a memory is read over a text; give some")
    return _summed(said, triggers, sums, jnp.concatenate(following))


def _step(
    model: Transformer,
    said: Sequence[Array],
    triggers: Sequence[Triggers],
    start: Array,
    batch: tuple[Tokens, Tokens, Tokens],
    normed: bool,
) -> tuple[list[Triggers], Any, Int[Array, " n"]]:
    """Take in one batch: longer triggers, sums over its tokens, and their next ones."""
    tokens, segments, positions = map(jnp.asarray, batch)
    following, valid = _following(tokens, segments)
    found, sums = [], []
    looks = look(model, tokens, segments=segments, positions=positions)
    for known, says, seen in zip(triggers, said, looks, strict=True):
        flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), seen)
        found.append(merged(known, flat.coefficients, valid, start=start))
        own = composed(
            first_choices(model, flat.added, normed=normed), says, flat.coefficients
        )
        choices = (
            first_choices(model, x, normed=True) for x in (flat.before, flat.after)
        )
        changed = jnp.not_equal(*choices)
        active = jnp.mean(flat.coefficients > 0, axis=-1, dtype=jnp.float32)
        marks = (x.astype(jnp.float32) for x in (own, changed))
        per_token = jnp.stack([active, *marks])
        sums.append(jnp.where(valid[None], per_token, 0).sum(-1))
    return found, (jnp.stack(sums), valid.sum()), following


def _following(
    tokens: Int[Array, "b t"], segments: Int[Array, "b t"]
) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """Give the token after each, and whether it is of the same document."""
    after = jnp.roll(tokens, -1, axis=1)
    same = (segments > 0) & (segments == jnp.roll(segments, -1, axis=1))
    same &= jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1
    return after.reshape(-1), same.reshape(-1)


def _summed(
    said: Sequence[Array], triggers: Sequence[Triggers], sums: Any, following: Array
) -> list[Reading]:
    totals, count = sums
    means = np.asarray(totals) / max(int(count), 1)
    found = []
    for says, known, (active, own, changed) in zip(said, triggers, means, strict=True):
        right, asked = agrees(says, known, following)
        agreement = float(right.sum() / jnp.maximum(asked.sum(), 1))
        shares = [float(x) for x in (asked.mean(), active, own, changed)]
        found.append(Reading(known, says, agreement, *shares))
    return found


def _feed_forward(block: Block) -> Any:
    layer = getattr(block, block.name)
    if type(layer) not in MEMORIES:
        raise ValueError(
            f"a layer of {type(layer).__name__}: it is no sum of fixed values; read"
            f" {', '.join(sorted(kind.__name__ for kind in MEMORIES))}"
        )
    return layer
