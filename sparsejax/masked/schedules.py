"""Schedules: the step in, the density after that step out.

Every schedule has the signature ``(step, ramp) -> density``. It is ``ramp.initial``
before ``ramp.begin`` (``constant`` alone starts at the end) and ``ramp.final`` from
``ramp.end`` on; masks follow it at ``begin``, ``begin + every``, ... ``end`` only.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from sparsejax.typing import Array, Float, Int

__all__ = [
    "Ramp",
    "Window",
    "ac_dc",
    "constant",
    "cubic",
    "geometric",
    "halving",
    "one_shot",
    "window",
]


class Ramp(NamedTuple):
    """From which density to which, and when; in steps counted from 0."""

    initial: float
    final: float
    begin: int
    end: int
    every: int = 1


def constant(step: int | Int[Array, "*steps"], ramp: Ramp) -> Float[Array, "*steps"]:
    """Stay at the final density, before the first step already."""
    return jnp.full(jnp.shape(step), ramp.final, jnp.float32)


def one_shot(step: int | Int[Array, "*steps"], ramp: Ramp) -> Float[Array, "*steps"]:
    """Jump at ``begin``."""
    return _select(jnp.asarray(step) < ramp.begin, ramp.initial, ramp.final)


def cubic(step: int | Int[Array, "*steps"], ramp: Ramp) -> Float[Array, "*steps"]:
    """Prune fast while much is redundant, slowly towards the end.

    The mean over the ramp lies a quarter of the way up from the final density.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, Eq. 1.
    """
    passed = jnp.asarray(step, jnp.float32) - ramp.begin
    left = 1 - jnp.clip(passed / max(ramp.end - ramp.begin, 1), 0, 1)
    density = ramp.final + (ramp.initial - ramp.final) * left**3
    return _select(jnp.asarray(step) >= ramp.end, ramp.final, density)


def geometric(step: int | Int[Array, "*steps"], ramp: Ramp) -> Float[Array, "*steps"]:
    """Keep the same fraction of what is live at every pruning.

    With prunings 0 to K - 1, number k leaves ``initial (final / initial)^((k + 1)/K)``.

    Source: Jin et al. 2025, arXiv:2501.12486, Sec. 3.
    """
    prunings = (ramp.end - ramp.begin) // ramp.every + 1
    done = (jnp.asarray(step) - ramp.begin) // ramp.every + 1
    power = jnp.clip(done, 0, prunings).astype(jnp.float32) / prunings
    density = ramp.initial * jnp.float32(ramp.final / ramp.initial) ** power
    return _select(jnp.asarray(step) >= ramp.end, ramp.final, density)


def ac_dc(step: int | Int[Array, "*steps"], ramp: Ramp) -> Float[Array, "*steps"]:
    """Alternate dense and sparse phases of ``every`` steps; the last one is sparse.

    Source: Peste et al. 2021, arXiv:2106.12379, Alg. 1. Departure: a dense phase starts
    with the moments of the live weights; only those of the returning ones are 0.
    """
    phase = (jnp.asarray(step) - ramp.begin) // ramp.every
    sparse = (jnp.asarray(step) >= ramp.end) | ((phase >= 0) & (phase % 2 == 1))
    return _select(sparse, ramp.final, ramp.initial)


def halving(step: int | Int[Array, "*steps"], ramp: Ramp) -> Float[Array, "*steps"]:
    """Halve what is kept in equal frames of time: 1/2, 1/4, ... to the final density.

    For groups of m, begin with ``initial=(m - 1)/m``.

    Source: Bambhaniya et al. 2024, arXiv:2402.04744, Sec. 4.2. Departure: what the
    masks begin with lasts until ``begin`` and has no frame of its own.
    """
    frames = max(math.ceil(-math.log2(ramp.final)), 1)
    passed = jnp.asarray(step, jnp.float32) - ramp.begin
    frame = jnp.ceil(passed * frames / max(ramp.end - ramp.begin, 1))
    halves = jnp.exp2(-jnp.clip(frame, 0, frames))
    density = jnp.clip(halves, ramp.final, ramp.initial)
    return _select(jnp.asarray(step) >= ramp.end, ramp.final, density)


class Window(NamedTuple):
    """When to prune; the fields of a plan."""

    begin: int
    end: int


def window(
    steps: int, density: float, *, first: float = 0.25, last: float = 0.75, every: int
) -> Window:
    """Find the steps between which two fractions of a run's compute are spent.

    Compute is the sum of the density over the steps, which falls geometrically from 1
    in between: the later a step, the less it costs.

    Source: Jin et al. 2025, arXiv:2501.12486, Sec. 3.

    Args:
        steps: of the whole run.
        density: at the end.
        first: fraction of the compute that is spent before pruning.
        last: fraction that is spent when it ends.
        every: steps between prunings; the window is a multiple of it.

    Raises:
        ValueError: if no pruning fits into the window.
    """
    # Steps that a unit of compute takes: dense, falling (its mean density), sparse.
    slope = math.log(1 / density) / (1 - density) if density < 1 else 1.0
    spans = (first, (last - first) * slope, (1 - last) / density)
    unit = steps / sum(spans)
    begin = round(spans[0] * unit)
    prunings = round(spans[1] * unit / every)
    if prunings < 1:
        raise ValueError(
            f"every={every}: {spans[1] * unit:.1f} steps lie between {first} and {last}"
            f" of the compute of {steps}; prune more often"
        )
    return Window(begin, begin + prunings * every)


def _select(
    which: Array,
    yes: float | Float[Array, "*steps"],
    no: float | Float[Array, "*steps"],
) -> Float[Array, "*steps"]:
    return jnp.where(which, jnp.float32(yes), jnp.float32(no))
