"""What makes a key fire, and what its value says: layers read as key-value memories.

A layer that adds ``sum_i c_i value_i`` to the residual stream is a memory whose keys
are whatever gives the coefficients ``c``: the hidden channels of a dense feed-forward,
the slots of a lookup, experts of one neuron. A key's triggers are the prefixes of a
text at whose end its coefficient is largest; its value's saying is the token that it
raises most. Arrays in, arrays out: ``sparsejax.nn.reading`` gets them from a model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.typing import Array, Bool, Float, Int

__all__ = ["Triggers", "agrees", "composed", "merged", "no_triggers", "rank"]


class Triggers(NamedTuple):
    """The best prefixes of each key, the best first; unused entries have place -1."""

    coefficients: Float[Array, "f k"]
    places: Int[Array, "f k"]  # of the prefix's last token in the text


def no_triggers(keys: int, *, top: int) -> Triggers:
    """Give what is known before any text.

    Raises:
        ValueError: if a key shall have no triggers at all.
    """
    if top < 1:
        raise ValueError(f"top={top}: a key has 1 trigger or more; the paper takes 25")
    coefficients = jnp.zeros((keys, top), jnp.float32)
    return Triggers(coefficients, jnp.full((keys, top), -1, jnp.int32))


def merged(
    triggers: Triggers,
    coefficients: Float[Array, "n f"],
    valid: Bool[Array, " n"],
    *,
    start: int | Int[Array, ""],
) -> Triggers:
    """Take in the next ``n`` tokens of the text.

    Only coefficients above 0 trigger; ties go to the earlier place.

    Args:
        valid: tokens that count.
        start: place of the first of them.

    Source: Geva et al. 2020, arXiv:2012.14913, Sec. 3.
    """
    places = (start + jnp.arange(coefficients.shape[0])).astype(jnp.int32)
    own = jnp.where(valid[:, None], coefficients.astype(jnp.float32), 0).T
    all_of = jnp.concatenate([triggers.coefficients, own], axis=1)
    # What came before stands before: top_k keeps the first of equals.
    best, at = jax.lax.top_k(all_of, triggers.places.shape[1])
    known = jnp.broadcast_to(places[None], own.shape)
    known = jnp.concatenate([triggers.places, known], axis=1)
    places = jnp.where(best > 0, jnp.take_along_axis(known, at, axis=1), -1)
    return Triggers(jnp.maximum(best, 0), places)


def agrees(
    said: Int[Array, " f"], triggers: Triggers, following: Int[Array, " n"]
) -> tuple[Bool[Array, " f"], Bool[Array, " f"]]:
    """Compare what each value says with what followed its key's best trigger.

    Args:
        said: the token that each value raises most.
        following: the token after each place of the text.

    Returns:
        Which keys agree, and which have a trigger to agree with.

    Source: Geva et al. 2020, arXiv:2012.14913, Sec. 4.
    """
    place = triggers.places[:, 0]
    return (said == following[place]) & (place >= 0), place >= 0


def rank(
    scores: Float[Array, "f v"], triggers: Triggers, following: Int[Array, " n"]
) -> Int[Array, " f"]:
    """Count the tokens that each value raises more than the one after its best trigger.

    A key without a trigger has -1.

    Source: Geva et al. 2020, arXiv:2012.14913, Sec. 4.
    """
    place = triggers.places[:, 0]
    wanted = jnp.take_along_axis(scores, following[place][:, None], axis=1)
    above = (scores > wanted).sum(axis=1, dtype=jnp.int32)
    return jnp.where(place >= 0, above, -1)


def composed(
    layer: Int[Array, " n"], said: Int[Array, " f"], coefficients: Float[Array, "n f"]
) -> Bool[Array, " n"]:
    """Say where a layer's first choice is that of none of its active memories.

    Args:
        layer: the token that the layer's whole output raises most.
        said: the token that each value raises most.
        coefficients: a memory with one above 0 is active.

    Source: Geva et al. 2020, arXiv:2012.14913, Sec. 5.1.
    """
    return ~jnp.any((coefficients > 0) & (said[None] == layer[:, None]), axis=1)
