"""Rotary embedding beyond the trained length: slower rates, and an amplitude.

A scaling is a frozen dataclass with ``rates(turns, theta)``, which gives the rates of
``theta`` for longer texts, ``amplitude``, which multiplies every rotated query and key,
and ``logit_gain``, which multiplies the logits of latent attention, where not all
channels are rotated. Rates are in turns a position, the fastest first.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from sparsejax.config import require
from sparsejax.typing import Array, Float

__all__ = ["LinearScaling", "Llama3Scaling", "RopeScaling", "YarnScaling"]


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divide all positions by ``factor``.

    Source: Chen et al. 2023, arXiv:2306.15595, Eq. 4.
    """

    kind: Literal["linear"] = "linear"
    factor: float

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")

    @property
    def amplitude(self) -> float:
        """Nothing is amplified."""
        return 1.0

    @property
    def logit_gain(self) -> float:
        """Nothing is amplified."""
        return 1.0

    def rates(self, turns: Float[Array, " c"], theta: float) -> Float[Array, " c"]:
        """Turn so many times more slowly."""
        del theta
        return turns / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow down what turns fewer than ``low`` times in the trained length.

    What turns more than ``high`` times is left alone; between them the two are mixed,
    linearly in the number of turns. This is how the checkpoints of Llama 3.1 are
    stretched, from 8192 ``trained`` tokens by a ``factor`` of 8.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float
    low: float = 1.0
    high: float = 4.0
    trained: int = 8192

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        between = 0 < self.low < self.high
        require(between, "low", self.low, f"above 0 and below high={self.high}")
        require(self.trained > 0, "trained", self.trained, "must be positive")

    @property
    def amplitude(self) -> float:
        """Nothing is amplified."""
        return 1.0

    @property
    def logit_gain(self) -> float:
        """Nothing is amplified."""
        return 1.0

    def rates(self, turns: Float[Array, " c"], theta: float) -> Float[Array, " c"]:
        """Mix kept and divided rates by the turns in the trained length."""
        del theta
        share = (self.trained * turns - self.low) / (self.high - self.low)
        share = jnp.clip(share, 0, 1)
        return turns * (share + (1 - share) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Slow down what turns fewer than ``slow`` times in the trained length.

    What turns more than ``fast`` times is left alone; between them the two are mixed,
    linearly in the channel. Queries and keys grow by ``amplitude``, which by default is
    ``1 + 0.1 ln factor``.

    Attributes:
        truncate: whether the mixing begins and ends at whole channels.
        gain: the amplitude, if it is not the default.
        mscale: where only a part of the channels is rotated, as DeepSeek has it: the
            amplitude is ``1 + 0.1 mscale ln factor``, over the same of ``mscale_all``.
        mscale_all: the logits of all channels grow by the square of that.

    Source: Peng et al. 2023, arXiv:2309.00071, Sec. 3.2-3.4.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float
    slow: float = 1.0
    fast: float = 32.0
    trained: int
    truncate: bool = True
    gain: float | None = None
    mscale: float | None = None
    mscale_all: float | None = None

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        between = 0 < self.slow < self.fast
        require(between, "slow", self.slow, f"above 0 and below fast={self.fast}")
        require(self.trained > 0, "trained", self.trained, "must be positive")
        some = self.gain is None or self.gain > 0
        require(some, "gain", self.gain, "must be positive; or leave it none")
        both = self.mscale, self.mscale_all
        fits = both == (None, None) or all(x is not None and x > 0 for x in both)
        rule = f"must be positive, together with mscale_all={self.mscale_all}"
        require(fits, "mscale", self.mscale, f"{rule}; or leave both none")

    def _growth(self, share: float) -> float:
        return 1 + 0.1 * share * math.log(self.factor)

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by."""
        if self.gain is not None:
            return self.gain
        if self.mscale is None or self.mscale_all is None:
            return self._growth(1.0)
        return self._growth(self.mscale) / self._growth(self.mscale_all)

    @property
    def logit_gain(self) -> float:
        """What the logits are multiplied by, besides."""
        return 1.0 if self.mscale_all is None else self._growth(self.mscale_all) ** 2

    def _channel(self, turns: float, theta: float, half: int) -> float:
        """Say which channel pair turns so many times in the trained length."""
        return half * math.log(self.trained / (turns * 2 * math.pi)) / math.log(theta)

    def rates(self, turns: Float[Array, " c"], theta: float) -> Float[Array, " c"]:
        """Mix kept and divided rates by the channel."""
        half = turns.shape[0]
        first = self._channel(self.fast, theta, half)
        last = self._channel(self.slow, theta, half)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        last = last + 1e-3 if first == last else last
        share = (jnp.arange(half, dtype="float32") - first) / (last - first)
        share = jnp.clip(share, 0, 1)
        return turns * ((1 - share) + share / self.factor)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
