"""Continue token sequences with a key-value cache.

``generate`` is pure and jittable; ``stream`` gives each token as soon as it is drawn,
and takes prompts of different lengths.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.nn.decoder import Decoder, Whole
from sparsejax.nn.transformer import Transformer
from sparsejax.partition import platform
from sparsejax.typing import Array, Float, Int, PRNGKeyArray, PyTree

LEAST, MOST = (float(x) for x in (np.finfo("float32").tiny, np.finfo("float32").max))


def nucleus(logits: Float[Array, "b v"], *, top_p: float) -> Float[Array, "b v"]:
    """Keep the fewest tokens whose probability reaches ``top_p``; the rest is -inf.

    All are kept at 1, where a sum of rounded numbers may be there before the last.

    Source: Holtzman et al. 2019, arXiv:1904.09751, Sec. 3.1.
    """
    if top_p == 1:
        return logits
    best = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    kept = jnp.maximum(kept, 1)  # a share may be too small for single precision
    threshold = jnp.take_along_axis(best, kept - 1, axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def draw(
    logits: Float[Array, "b v"], key: PRNGKeyArray, *, temperature: float, top_p: float
) -> Int[Array, " b"]:
    """Draw the next tokens; temperature 0 takes the most likely."""
    if temperature < LEAST:  # as good as 0, and 0 where the device flushes
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    below = logits - logits.max(axis=-1, keepdims=True)  # so that none becomes inf
    kept = nucleus(below / temperature, top_p=top_p)
    return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)


def check_length(model: Transformer, tokens: int) -> None:
    """Raise ``ValueError`` for more tokens than the model is made for."""
    most = model.config.context_length
    if most is not None and tokens > most:
        raise ValueError(
            f"{tokens} tokens of prompt and continuation: the model is made for"
            f" {most} (model.context_length); ask for fewer"
        )


def generate(
    model: Transformer,
    prompt: Int[Array, "b t"],
    *,
    tokens: int,
    key: PRNGKeyArray,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> Int[Array, "b k"]:
    """Continue every prompt by ``tokens`` tokens.

    Raises:
        ValueError: if temperature is negative, top_p is not in (0, 1], or there are
            fewer tokens than none or more than the model is made for.
    """
    _check_drawing(tokens, temperature, top_p)
    check_length(model, prompt.shape[1] + tokens)
    pick = functools.partial(draw, temperature=temperature, top_p=top_p)
    block = model.config.attention.block_kv
    capacity = -(-(prompt.shape[1] + tokens) // block) * block
    hidden = model(prompt, caches=model.empty_caches(prompt.shape[0], capacity))
    last = model.logits(hidden.value[:, -1:])[:, 0]

    def body(carry: tuple[Array, Array, PyTree], key: Array) -> Any:
        logits, previous, caches = carry
        token = pick(logits, key)
        hidden = model(token[:, None], previous=previous, caches=caches)
        return (model.logits(hidden.value)[:, 0], token, hidden.caches), token

    keys = jax.random.split(key, tokens)
    _, chosen = jax.lax.scan(body, (last, prompt[:, -1], hidden.caches), keys)
    return chosen.T


def _check_drawing(tokens: int, temperature: float, top_p: float) -> None:
    if tokens < 0:
        raise ValueError(f"tokens={tokens}: must not be negative; 0 draws nothing")
    if not 0 <= temperature <= MOST or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: temperature must not be"
            " negative or infinite, and top_p must be in (0, 1]"
        )


def stream(
    model: Transformer,
    prompts: Sequence[Int[np.ndarray, "_"]],
    *,
    tokens: int,
    key: PRNGKeyArray,
    temperature: float = 0.8,
    top_p: float = 0.95,
    ends: frozenset[int] = frozenset(),
) -> Iterator[Int[np.ndarray, " b"]]:
    """Continue every prompt by up to ``tokens`` tokens, a step of all rows at a time.

    All rows are read up to the end of the shortest prompt; from there each takes its
    own prompt's tokens while there are any, and drawn ones after.

    Args:
        prompts: ids, at least one each.
        ends: ids after which a row is over.

    Yields:
        The drawn token of each row; -1 where a row is in its prompt or over.

    Raises:
        ValueError: as ``generate`` does, and for an empty prompt.
    """
    _check_drawing(tokens, temperature, top_p)
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("prompts: give at least one, of at least one token")
    first, steps = int(lengths.min()), int(lengths.max() - lengths.min()) + tokens
    check_length(model, int(lengths.max()) + tokens)
    forced = np.full((len(prompts), first + steps), -1, np.int32)
    for row, prompt in zip(forced, prompts, strict=True):
        row[: len(prompt)] = prompt
    block = model.config.attention.block_kv
    capacity = -(-(first + steps) // block) * block
    reader = Decoder(model) if platform() == "cpu" else Whole(model)
    caches = reader.empty_caches(len(prompts), capacity)
    how = {"temperature": temperature, "top_p": top_p}
    over, fresh, previous = np.zeros(len(prompts), bool), forced[:, :first], None
    for index, key_ in enumerate(jax.random.split(key, steps)):
        place = first + index
        logits, caches = reader(jnp.asarray(fresh), caches, previous=previous)
        token = np.asarray(_taken(logits, key_, forced[:, place], **how))
        drawing = ~over & (place >= lengths) & (place < lengths + tokens)
        yield np.where(drawing, token, -1)
        over |= drawing & np.isin(token, list(ends))
        if over.all():
            return
        fresh, previous = token[:, None], jnp.asarray(fresh[:, -1])


@functools.partial(jax.jit, static_argnames=("temperature", "top_p"))
def _taken(
    logits: Array, key: Array, forced: Array, *, temperature: float, top_p: float
) -> Array:
    """Draw a token, or take the forced one."""
    drawn = draw(logits, key, temperature=temperature, top_p=top_p)
    return jnp.where(forced >= 0, forced, drawn)
