"""What a model is: sizes, and which member of each family stands in which layer."""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from sparsejax.attention import AttentionConfig
from sparsejax.config import choose, require
from sparsejax.memory import (
    FastFeedForwardConfig,
    MemoryConfig,
    MemoryPlusConfig,
    PEERConfig,
)
from sparsejax.moe import ACTIVATIONS, MoEConfig

REMAT = ("none", "full", "dots", "names")


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """A dense gated feed-forward layer."""

    kind: Literal["gated"] = "gated"
    hidden: int
    activation: str = "silu"

    def __post_init__(self) -> None:
        require(self.hidden > 0, "hidden", self.hidden, "must be positive")
        choose("activation", self.activation, ACTIVATIONS)


AnyMemoryConfig = MemoryConfig | MemoryPlusConfig | PEERConfig | FastFeedForwardConfig
FeedForwardConfig = GatedConfig | MoEConfig | AnyMemoryConfig


class LayerSpec(NamedTuple):
    """One layer: how it attends, and what follows."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer whose every part may be sparse.

    ``memory_layers`` names the layers (counted from 0) whose feed-forward is the
    memory; those of kind ``memory_plus`` share one pool of values. ``remat`` says what
    the backward pass computes again: ``none`` keeps everything, ``full`` keeps the
    layers' inputs, ``dots`` keeps matrix products, ``names`` keeps what the layers
    named. The first ``dense_layers`` have a dense feed-forward of width
    ``dense_hidden`` in place of experts. ``context_length`` is the number of tokens the
    model is made for; none for any number.
    """

    depth: int
    width: int
    heads: int
    kv_heads: int
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: GatedConfig | MoEConfig
    dense_layers: int = 0
    dense_hidden: int = 0
    memory: AnyMemoryConfig | None = None
    memory_layers: tuple[int, ...] = ()
    tied: bool = True
    embedding_scale: float | None = None  # on what is looked up; the root of the width
    norm_epsilon: float = 1e-6
    context_length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        scale = self.embedding_scale
        fits = scale is None or scale > 0
        require(fits, "embedding_scale", scale, "must be positive; or leave it none")
        for name in ("depth", "width", "heads", "kv_heads", "norm_epsilon"):
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive")
        grouped = self.heads % self.kv_heads == 0
        require(grouped, "kv_heads", self.kv_heads, f"must divide heads={self.heads}")
        require(
            self.attention.head_width is not None
            or self.attention.latent is not None
            or self.width % self.heads == 0,
            "heads",
            self.heads,
            f"must divide width={self.width}; or give attention.head_width",
        )
        own = self.attention.latent is None or self.kv_heads == self.heads
        rule = (
            f"must be heads={self.heads}: with attention.latent each has its own keys"
        )
        require(own, "kv_heads", self.kv_heads, rule)
        choose("remat", self.remat, dict.fromkeys(REMAT))
        self._check_memory()
        self._check_dense()
        context = self.context_length
        some = context is None or context > 0
        require(some, "context_length", context, "must be positive; or leave it none")
        other = self.ffn.leak if isinstance(self.ffn, MoEConfig) else None
        require(
            other is None or not self.attention.causal,
            "ffn.router",
            getattr(self.ffn, "router", None),
            f"lets a token see later ones, in a causal model; take {other!r}, or set"
            " attention.causal=False",
        )

    def _check_dense(self) -> None:
        layers, experts = self.dense_layers, isinstance(self.ffn, MoEConfig)
        require(
            layers == 0 or (experts and 0 < layers < self.depth),
            "dense_layers",
            layers,
            f"must be below depth={self.depth}, in a model of experts; 0 for none",
        )
        require(
            (layers > 0) == (self.dense_hidden > 0),
            "dense_hidden",
            self.dense_hidden,
            "must be positive exactly if there are dense_layers",
        )
        if layers:
            choose("ffn.activation", self.ffn.activation, ACTIVATIONS)

    def _check_memory(self) -> None:
        layers = self.memory_layers
        require(
            all(0 <= x < self.depth for x in layers)
            and len(set(layers)) == len(layers),
            "memory_layers",
            layers,
            f"must be distinct and below depth={self.depth}",
        )
        require(
            (self.memory is None) == (not layers),
            "memory_layers",
            layers,
            "must name at least one layer exactly if model.memory is given",
        )

    def layer(self, index: int) -> LayerSpec:
        """Say what stands in layer ``index``."""
        attention = self.attention
        if attention.dense_every and (index + 1) % attention.dense_every == 0:
            plain = {"pattern": "causal", "selector": None}
            attention = replace(attention, **plain, arguments={}, selection={})
        if self.memory is not None and index in self.memory_layers:
            return LayerSpec(attention, self.memory)
        if index < self.dense_layers:
            dense = GatedConfig(
                hidden=self.dense_hidden, activation=self.ffn.activation
            )
            return LayerSpec(attention, dense)
        return LayerSpec(attention, self.ffn)


class Run(NamedTuple):
    """Layers ``start …``: ``period`` of them, repeated ``repeats`` times."""

    start: int
    period: tuple[LayerSpec, ...]
    repeats: int


def runs(config: ModelConfig) -> list[Run]:
    """Cut the layers into as few scans as a greedy reading finds.

    At each layer the period is taken that covers most of what follows; among equals
    the shortest. Twenty-four equal layers are one run; every third layer dense is one
    run of period three.
    """
    specs = [config.layer(index) for index in range(config.depth)]
    found, start = [], 0
    while start < len(specs):
        best = max(
            (_repeats(specs, start, period) for period in range(1, len(specs) + 1)),
            key=lambda run: (len(run.period) * run.repeats * (run.repeats > 1), run[2]),
        )
        if best.repeats == 1:
            best = Run(start, (specs[start],), 1)
        found.append(best)
        start += len(best.period) * best.repeats
    return found


def _repeats(specs: list[LayerSpec], start: int, period: int) -> Run:
    unit, repeats = specs[start : start + period], 1
    while specs[start + repeats * period :][:period] == unit:
        repeats += 1
    return Run(start, tuple(unit), repeats)
