"""Sparse attention: patterns say who may read whom, block masks make it cheap."""

from sparsejax.attention.attended import Attended, Segments
from sparsejax.attention.block_patterns import bigbird, in_blocks, power_attention
from sparsejax.attention.config import PATTERNS, AttentionConfig, LatentConfig
from sparsejax.attention.latent import LatentAttention
from sparsejax.attention.layer import Attention, Cache, empty_cache
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
from sparsejax.attention.selectors import (
    METHODS,
    SELECTORS,
    Centroids,
    Sizes,
    Work,
    moved,
)
from sparsejax.attention.video_patterns import (
    diagonal,
    multi_diagonal,
    vertical_stripe,
)

__all__ = [
    "IMPLEMENTATIONS",
    "METHODS",
    "PATTERNS",
    "SELECTORS",
    "Attended",
    "Attention",
    "AttentionConfig",
    "BlockMask",
    "Cache",
    "Centroids",
    "LatentAttention",
    "LatentConfig",
    "Pattern",
    "Segments",
    "Sizes",
    "Work",
    "bigbird",
    "block_diagonal",
    "block_sparse_attention",
    "block_sparse_attention_and_lse",
    "causal",
    "diagonal",
    "dilated",
    "empty_cache",
    "first",
    "fixed",
    "full",
    "in_blocks",
    "moved",
    "multi_diagonal",
    "power_attention",
    "prefix",
    "rope",
    "sliding_window",
    "streaming_llm",
    "strided",
    "vertical_stripe",
]
