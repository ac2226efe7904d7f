"""The axis alphabet, and the few types that every family shares.

One letter means one thing in shape annotations, in ``einsum`` strings, in the ``axes``
of parameters and in sharding rules. A new letter is added here first.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

__all__ = [
    "ALPHABET",
    "Array",
    "Bool",
    "Float",
    "Int",
    "Output",
    "PRNGKeyArray",
    "PyTree",
]

ALPHABET = {
    "b": "batch",
    "t": "query tokens",
    "s": "key tokens",
    "n": "flattened tokens",
    "d": "model width",
    "f": "hidden width",
    "h": "query heads",
    "g": "key-value heads",
    "c": "head width",
    "i": "query blocks",
    "j": "key blocks",
    "w": "tokens per block",
    "e": "experts",
    "k": "chosen per token",
    "q": "slots per expert",
    "m": "memory slots",
    "u": "memory slots that are touched",
    "r": "sub-keys per half of a product key",
    "v": "vocabulary",
    "l": "layers",
    "z": "latent channels",
}


class Output(NamedTuple):
    """What a layer returns: its value, and what it asks to be minimised and logged."""

    value: Float[Array, "b t d"]
    losses: dict[str, Float[Array, ""]]  # already weighted: the step adds them up
    metrics: dict[str, Array]  # any shape; the model stacks them over layers
