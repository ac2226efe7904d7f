"""Learned masks: every group has a logit for each mask it could have.

While training, a group's mask is a random mixture of its candidates, which the schedule
makes ever less random; ``sparse`` follows the loss with the logits, and leaves the
weights alone. Evaluated, a group has the candidate of the highest logit.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masked.criteria import Evidence
from sparsejax.masked.estimators import ANY, Now, masked, passed
from sparsejax.masked.updaters import Rule
from sparsejax.typing import Array, Bool, Float, PRNGKeyArray

__all__ = ["Learning", "first_logits", "gumbel", "learn", "learned", "mixture"]

TEMPERATURES, SCALES = (4.0, 0.05), (1e2, 5e2)  # at begin and end, linear between
DEVIATION = 0.014  # of the first logits
MOST = 70  # candidates, those of four of eight


class Learning(NamedTuple):
    """How logits are trained."""

    rate: float = 5e-4  # Adam's
    prior: float = 3.0  # how far the initial mask leads, in deviations of the logits
    reward: float = 1e-5  # for large weights kept: their gradients stay large


def gumbel(
    weight: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    now: Now = ANY,
) -> Float[Array, "*shape"]:
    """Mix the candidates of each group at random, more and more one of them alone.

    Source: Fang et al. 2024, arXiv:2409.17481, Sec. 3.2.
    """
    if not now.training or now.logits is None:
        return passed(weight, masked(weight, mask))
    return passed(weight, weight * mixture(now.logits, now, weight.shape))


def learned(
    mask: Bool[Array, "*shape"],  # noqa: ARG001
    seen: Evidence,
    rule: Rule,
    *,
    rate: float = Learning().rate,
    prior: float = Learning().prior,
    reward: float = Learning().reward,
) -> Bool[Array, "*shape"]:
    """Take the candidate of the highest logit; the arguments are for their training.

    Source: Fang et al. 2024, arXiv:2409.17481, Sec. 3.3.
    """
    del rate, prior, reward
    if seen.logits is None:
        raise ValueError(
            "logits=None: masks are learned only with estimator='gumbel'; choose it"
        )
    structure: Any = rule.structure
    shape = seen.weight.shape
    table = jnp.asarray(_candidates(structure.m, _each(structure, shape, rule.final)))
    return structure.ungrouped(table[jnp.argmax(seen.logits, axis=-1)], shape)


def mixture(
    logits: Float[Array, "groups candidates"], now: Now, shape: tuple[int, ...]
) -> Float[Array, "*shape"]:
    """Give the random soft mask of a layer at this step."""
    structure: Any = now.structure
    key: Any = now.key
    rate, scale = (
        first + (last - first) * now.progress for first, last in (TEMPERATURES, SCALES)
    )
    table = _candidates(structure.m, _each(structure, shape, now.keep))
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    shares = jax.nn.softmax((scale * logits + noise) / rate, axis=-1)
    soft = jnp.matmul(shares, jnp.asarray(table, jnp.float32), precision="highest")
    return structure.ungrouped(soft, shape)


def first_logits(
    mask: Bool[Array, "*shape"],
    key: PRNGKeyArray,
    structure: Any,
    keep: int,
    prior: float,
) -> Float[Array, "groups candidates"]:
    """Draw the logits of a layer; those of candidates like the mask are higher.

    Raises:
        ValueError: if there are too many candidates.
    """
    each = _each(structure, mask.shape, keep)
    table = jnp.asarray(_candidates(structure.m, each), jnp.float32)
    groups = structure.grouped(mask).astype(jnp.float32)
    drawn = jax.random.normal(key, (len(groups), len(table))) * DEVIATION
    shared = groups @ table.T - each * each / structure.m
    return drawn + shared * prior * jnp.std(drawn)


def learn(
    learning: Learning,
    layers: Mapping[str, Any],
    state: tuple[dict[str, Array], Any],
) -> tuple[dict[str, Array], Any]:
    """Move logits by one step of Adam.

    Args:
        learning: how.
        layers: by path, ``(softened, weight, slope)``: a function from logits to a
            soft mask, the weights and the gradient of what the model used.
        state: the logits by path, and Adam's state of them.
    """
    logits, inner = state
    slopes: dict[str, Array] = {}
    for path, (softened, weight, slope) in layers.items():
        soft, back = jax.vjp(softened, logits[path])
        w, g = weight.astype(jnp.float32), slope.astype(jnp.float32)
        (slopes[path],) = back(w * g - 2 * learning.reward * w * w * soft)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
        updates, inner = optax.adam(learning.rate).update(slopes, inner)
    moved: Any = optax.apply_updates(logits, updates)
    return moved, inner


def _each(structure: Any, shape: tuple[int, ...], keep: Any) -> int:
    """Count what is kept in a group."""
    return int(keep) // structure.quantum(shape)


def _candidates(m: int, n: int) -> np.ndarray:
    """List the masks of a group, lower indices first."""
    chosen = list(itertools.combinations(range(m), n))
    if len(chosen) > MOST:
        raise ValueError(
            f"{n} of {m}: {len(chosen)} candidates, at most {MOST} can be learned;"
            " choose a smaller m"
        )
    table = np.zeros((len(chosen), m), bool)
    for row, kept in enumerate(chosen):
        table[row, list(kept)] = True
    return table
