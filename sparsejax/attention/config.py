"""What an attention layer is: its pattern, blocks and extras, all checked."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sparsejax.attention.block_patterns import bigbird, power_attention
from sparsejax.attention.operation import IMPLEMENTATIONS
from sparsejax.attention.patterns import (
    Pattern,
    block_diagonal,
    causal,
    dilated,
    fixed,
    full,
    prefix,
    sliding_window,
    streaming_llm,
    strided,
)
from sparsejax.attention.rope_scaling import RopeScaling
from sparsejax.attention.selectors import METHODS
from sparsejax.attention.video_patterns import (
    diagonal,
    multi_diagonal,
    vertical_stripe,
)
from sparsejax.config import ConfigError, FieldError, choose, convert, near, require

__all__ = ["PATTERNS", "AttentionConfig", "LatentConfig"]

PATTERNS: dict[str, Callable[..., Pattern]] = {
    "bigbird": bigbird,
    "block_diagonal": block_diagonal,
    "causal": causal,
    "diagonal": diagonal,
    "dilated": dilated,
    "fixed": fixed,
    "full": full,
    "multi_diagonal": multi_diagonal,
    "power_attention": power_attention,
    "prefix": prefix,
    "sliding_window": sliding_window,
    "streaming_llm": streaming_llm,
    "strided": strided,
    "vertical_stripe": vertical_stripe,
}


Argument = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Widths where keys and values of all heads come of one narrow vector a token.

    A cache keeps that vector, and one rotated key for all heads.
    """

    kv_rank: int  # of that vector
    query_rank: int | None = None  # of another, for queries; none to make them directly
    plain_width: int  # channels of a head's queries and keys that see no position
    rotated_width: int  # those that do
    value_width: int  # channels of a head's values
    interleaved: bool = False  # neighbouring channels turn together

    def __post_init__(self) -> None:
        for name in ("kv_rank", "plain_width", "rotated_width", "value_width"):
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive")
        rank, turned = self.query_rank, self.rotated_width
        rule = "must be positive; or none, to make queries directly"
        require(rank is None or rank > 0, "query_rank", rank, rule)
        require(turned % 2 == 0, "rotated_width", turned, "must be even: pairs turn")


class Widths(NamedTuple):
    """Channels of a head."""

    keys: int
    values: int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How a layer attends.

    ``arguments`` are the keywords of the pattern, ``window`` and ``sinks`` say. A
    ``selector`` lets the data decide what is read of that, and ``selection`` has its
    arguments where they differ from the defaults of its options. Blocks
    are in tokens. ``dense_every`` makes every n-th layer of a model plainly causal; 0
    for none. ``head_width`` is the model's width over its heads by default. With
    ``latent``, keys and values are made of one narrow vector a token.
    """

    pattern: str = "causal"
    arguments: dict[str, int] = field(default_factory=dict, hash=False)
    selector: str | None = None
    selection: dict[str, Argument] = field(default_factory=dict, hash=False)
    block_q: int = 128
    block_kv: int = 128
    head_width: int | None = None
    latent: LatentConfig | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = True  # root-mean-square norm of queries and keys
    qk_norm_over: Literal["head", "heads"] = "head"  # each by itself, or all at once
    norm_epsilon: float = 1e-6  # of that norm
    qkv_biases: bool = False  # whether queries, keys and values have one
    out_bias: bool = False
    softcap: float | None = None
    key_conv: int = 0  # taps of a convolution over keys; 0 for none
    learned_sinks: bool = False  # a learned logit per head that takes no value
    causal: bool = True  # refuse patterns that read the future
    dense_every: int = 0
    implementation: str | None = None

    def __post_init__(self) -> None:
        choose("pattern", self.pattern, PATTERNS)
        _check_arguments(self.pattern, self.arguments)
        for name in ("block_q", "block_kv", "rope_theta", "norm_epsilon"):
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive")
        turning = self.rope_scaling is None or self.rope_theta > 1
        rule = "must be above 1, or rope_scaling none"
        require(turning, "rope_theta", self.rope_theta, rule)
        width = self.head_width
        paired = width is None or (width > 0 and width % 2 == 0)
        require(paired, "head_width", width, "must be even and positive")
        capped = self.softcap is None or self.softcap > 0
        require(capped, "softcap", self.softcap, "must be positive; none for no cap")
        require(self.key_conv >= 0, "key_conv", self.key_conv, "must be >= 0")
        require(self.dense_every >= 0, "dense_every", self.dense_every, "must be >= 0")
        if self.implementation is not None:
            choose("implementation", self.implementation, IMPLEMENTATIONS)
        self._check_selector()
        self._check_latent()
        require(
            self.build().is_causal or not self.causal,
            "pattern",
            self.pattern,
            "reads the future; set causal=false if the model may, or choose one of"
            " causal, dilated, fixed, power_attention, sliding_window, streaming_llm,"
            " strided",
        )

    def build(self) -> Pattern:
        """Give the pattern itself."""
        return PATTERNS[self.pattern](**self.arguments)

    def widths(self, width: int, heads: int) -> Widths:
        """Say how wide a head is in a model of that width."""
        if self.latent is None:
            return Widths(*[self.head_width or width // heads] * 2)
        keys = self.latent.plain_width + self.latent.rotated_width
        return Widths(keys, self.latent.value_width)

    @property
    def is_causal(self) -> bool:
        """Whether no query reads its future."""
        if self.selector is None:
            return self.build().is_causal
        method = METHODS[self.selector]
        return method.causal and (not method.patterned or self.build().is_causal)

    @property
    def options(self) -> Any:
        """The selector's arguments, those not given at their defaults; None without."""
        if self.selector is None:
            return None
        return convert(METHODS[self.selector].options, self.selection, "selection")

    def _check_selector(self) -> None:
        if self.selector is None:
            rule = "arguments of no selector; set selector"
            require(not self.selection, "selection", self.selection, rule)
            return
        choose("selector", self.selector, METHODS)
        require(
            not self.causal or METHODS[self.selector].causal,
            "selector",
            self.selector,
            "reads the future; set causal=false if the model may",
        )
        rule = (
            "a selector chooses among all keys; set pattern=causal, without arguments"
        )
        plain = PATTERNS[self.pattern] is causal and not self.arguments
        plain = plain or METHODS[self.selector].patterned
        require(plain, "pattern", self.pattern, rule)
        try:
            _ = self.options
        except ConfigError as error:
            raise FieldError(str(error)) from None

    def _check_latent(self) -> None:
        scaling = self.rope_scaling
        plain = scaling is None or scaling.logit_gain == 1 or self.latent is not None
        rule = (
            "mscale is for channels that are not all rotated; set latent, or no mscale"
        )
        require(plain, "rope_scaling", scaling, rule)
        if self.latent is None:
            return
        able = sorted(name for name, method in METHODS.items() if method.latent)
        fits = self.selector is None or self.selector in able
        rule = f"does not choose by latent keys; take {', '.join(able)}, or none"
        require(fits, "selector", self.selector, rule)
        rule = "is plain_width + rotated_width of latent; leave it none"
        require(self.head_width is None, "head_width", self.head_width, rule)
        rule = "convolves keys of heads, and latent keeps none; set it to 0"
        require(self.key_conv == 0, "key_conv", self.key_conv, rule)
        rule = "latent norms its narrow vectors, not heads; leave it 'head'"
        require(self.qk_norm_over == "head", "qk_norm_over", self.qk_norm_over, rule)


def _check_arguments(pattern: str, arguments: Mapping[str, int]) -> None:
    needed = inspect.signature(PATTERNS[pattern]).parameters
    for name in arguments:
        if name not in needed:
            hint = near(name, needed) if needed else "; give none"
            rule = f"{pattern} takes no such argument{hint}"
            require(False, f"arguments.{name}", arguments[name], rule)
    missing = [
        name
        for name, parameter in needed.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    rule = f"{pattern} needs {', '.join(missing)}; give each in arguments"
    require(not missing, "arguments", dict(arguments), rule)
    try:
        PATTERNS[pattern](**arguments)
    except ValueError as error:
        require(False, "arguments", dict(arguments), str(error))
