"""Sparse attention: patterns say who may read whom, block masks make it cheap."""

from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.config import PATTERNS, AttentionConfig
from sparsejax.attention.layer import Attention, Cache
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.operation import (
    IMPLEMENTATIONS,
    block_sparse_attention,
    block_sparse_attention_and_lse,
)
from sparsejax.attention.patterns import (
    Pattern,
    block_diagonal,
    causal,
    dilated,
    first,
    fixed,
    full,
    prefix,
    sliding_window,
    streaming_llm,
    strided,
)
from sparsejax.attention.rope import rope

__all__ = [
    "IMPLEMENTATIONS",
    "PATTERNS",
    "Attended",
    "Attention",
    "AttentionConfig",
    "BlockMask",
    "Cache",
    "Pattern",
    "Segments",
    "block_diagonal",
    "block_sparse_attention",
    "block_sparse_attention_and_lse",
    "causal",
    "dilated",
    "first",
    "fixed",
    "full",
    "prefix",
    "rope",
    "sliding_window",
    "streaming_llm",
    "strided",
]
