"""Key-value memories: many slots, of which every token reads a few.

A lookup finds slots, a bag reads their rows, a layer owns the parameters of both. Every
layer is built as ``Layer(config, width, *, init_scale, rngs)`` and called as
``layer(x, valid=...)``; only ``MemoryPlus`` takes the shared pool after ``x``.
"""

from sparsejax.memory.bag import embedding_bag, row_products
from sparsejax.memory.config import (
    FastFeedForwardConfig,
    MemoryConfig,
    MemoryPlusConfig,
    PEERConfig,
)
from sparsejax.memory.layer import (
    MemoryPlus,
    ProductKeyMemory,
    QueryMoments,
    ValuePool,
    moved_moments,
    rest_moments,
)
from sparsejax.memory.lookup import Hits, product_key_top_k
from sparsejax.memory.peer import PEER
from sparsejax.memory.tree import FastFeedForward
from sparsejax.memory.usage import slot_counts

__all__ = [
    "MEMORIES",
    "PEER",
    "FastFeedForward",
    "FastFeedForwardConfig",
    "Hits",
    "MemoryConfig",
    "MemoryPlus",
    "MemoryPlusConfig",
    "PEERConfig",
    "ProductKeyMemory",
    "QueryMoments",
    "ValuePool",
    "embedding_bag",
    "moved_moments",
    "product_key_top_k",
    "rest_moments",
    "row_products",
    "slot_counts",
]

MEMORIES = {
    "product_key": ProductKeyMemory,
    "memory_plus": MemoryPlus,
    "peer": PEER,
    "fff": FastFeedForward,
}
