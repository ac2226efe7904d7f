"""What a memory is: one frozen dataclass per kind, named by its field ``kind``."""

from dataclasses import dataclass
from typing import Literal

from sparsejax.config import choose, require
from sparsejax.memory.lookup import IMPLEMENTATIONS

__all__ = [
    "FastFeedForwardConfig",
    "Lookup",
    "MemoryConfig",
    "MemoryPlusConfig",
    "PEERConfig",
]

MAX_SLOTS = 2**31 - 1  # ids are int32


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """A product-key memory that owns its values."""

    kind: Literal["product_key"] = "product_key"
    sub_keys: int  # r: sub-keys per half; the memory has r * r slots
    heads: int = 4
    per_head: int = 32  # slots that one head of one token reads
    key_width: int = 256  # of both halves together
    implementation: str = "xla"  # of the search, see ``product_key_top_k``
    query_norm: Literal["batch", "layer", "rms", "none"] = "layer"
    value_width: int | None = None  # None: the model's width
    gate: Literal["none", "swilu"] = "none"  # silu(x W) times what was read

    def __post_init__(self) -> None:
        _check_lookup(self)
        _check_value_width(self.value_width)

    @property
    def slots(self) -> int:
        """Rows of the value table."""
        return self.sub_keys**2

    @property
    def reads(self) -> int:
        """Rows that a token reads."""
        return self.heads * self.per_head


@dataclass(frozen=True, kw_only=True)
class MemoryPlusConfig:
    """A memory layer over a pool of values that several layers share."""

    kind: Literal["memory_plus"] = "memory_plus"
    sub_keys: int  # r: sub-keys per half; the pool has r * r slots
    heads: int = 4
    per_head: int = 32  # slots that one head of one token reads
    key_width: int = 512  # of both halves together
    implementation: str = "xla"  # of the search, see ``product_key_top_k``
    query_norm: Literal["batch", "layer", "rms", "none"] = "none"  # before qk_norm
    qk_norm: Literal["rms", "none"] = "rms"  # of each half of queries and keys
    value_width: int | None = None  # None: the model's width
    gate: Literal["none", "swilu"] = "swilu"  # silu(x W) times what was read

    def __post_init__(self) -> None:
        _check_lookup(self)
        rule = "would change nothing before qk_norm='rms'; set one of them to 'none'"
        twice = self.query_norm == self.qk_norm == "rms"
        require(not twice, "query_norm", self.query_norm, rule)
        _check_value_width(self.value_width)

    @property
    def slots(self) -> int:
        """Rows of the pool."""
        return self.sub_keys**2

    @property
    def reads(self) -> int:
        """Rows that a token reads in one layer."""
        return self.heads * self.per_head


@dataclass(frozen=True, kw_only=True)
class PEERConfig:
    """Single-neuron experts, retrieved by product keys."""

    kind: Literal["peer"] = "peer"
    sub_keys: int  # r: sub-keys per half; there are r * r experts
    heads: int = 8
    per_head: int = 16  # experts that one head of one token runs
    key_width: int = 256  # of both halves together
    implementation: str = "xla"  # of the search, see ``product_key_top_k``
    query_norm: Literal["batch", "layer", "rms", "none"] = "layer"
    scores: Literal["softmax", "sigmoid", "relu"] = "softmax"  # from scores to weights
    activation: Literal["gelu", "relu", "silu"] = "gelu"

    def __post_init__(self) -> None:
        _check_lookup(self)

    @property
    def slots(self) -> int:
        """Number of experts."""
        return self.sub_keys**2

    @property
    def reads(self) -> int:
        """Experts that a token runs: a row of two tables each."""
        return self.heads * self.per_head


@dataclass(frozen=True, kw_only=True)
class FastFeedForwardConfig:
    """A binary tree whose leaves are small feed-forward layers."""

    kind: Literal["fff"] = "fff"
    depth: int  # decisions on the way to a leaf; there are 2 ** depth leaves
    leaf_width: int  # neurons of one leaf
    path: Literal["soft", "hard"] = "soft"  # all leaves, weighted; or the one leaf
    inference: Literal["soft", "hard"] | None = None  # path of evaluation, if another
    hardening: float = 3.0  # weight of the entropy of decisions, in nats per token
    activation: Literal["gelu", "relu", "silu"] = "relu"

    def __post_init__(self) -> None:
        rule = "must be in 1..24; without decisions, take a dense feed-forward"
        require(1 <= self.depth <= 24, "depth", self.depth, rule)
        rule = "must be at least 1"
        require(self.leaf_width >= 1, "leaf_width", self.leaf_width, rule)
        rule = "depth and leaf_width give too many neurons for int32 ids"
        require(self.slots <= MAX_SLOTS, "leaf_width", self.leaf_width, rule)
        rule = "must not be negative; 0 lets decisions stay soft"
        require(self.hardening >= 0, "hardening", self.hardening, rule)

    @property
    def leaves(self) -> int:
        """Leaves of the tree."""
        return 2**self.depth

    @property
    def slots(self) -> int:
        """Neurons of all leaves."""
        return self.leaves * self.leaf_width

    @property
    def reads(self) -> int | None:
        """Neurons that a token runs; None if it runs all."""
        return {"hard": self.leaf_width}.get(self.path)


Lookup = MemoryConfig | MemoryPlusConfig | PEERConfig


def _check_lookup(config: Lookup) -> None:
    r, k, c = config.sub_keys, config.per_head, config.key_width
    require(r >= 1, "sub_keys", r, "must be at least 1")
    require(r * r <= MAX_SLOTS, "sub_keys", r, "its square must have int32 ids")
    require(config.heads >= 1, "heads", config.heads, "must be at least 1")
    rule = f"must be in 1..{r * r}, the slots of sub_keys={r}"
    require(1 <= k <= r * r, "per_head", k, rule)
    rule = "must be even and at least 2; each half has its own sub-keys"
    require(c >= 2 and c % 2 == 0, "key_width", c, rule)
    choose("implementation", config.implementation, IMPLEMENTATIONS)


def _check_value_width(width: int | None) -> None:
    rule = "must be at least 1, or none for the model's width"
    require(width is None or width >= 1, "value_width", width, rule)
