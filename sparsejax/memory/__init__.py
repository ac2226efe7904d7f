"""Key-value memories: many slots, of which every token reads a few.

A lookup finds slots, a bag reads their rows, a layer owns the parameters of both.
"""

from sparsejax.memory.bag import embedding_bag, row_products
from sparsejax.memory.layer import MemoryConfig, ProductKeyMemory
from sparsejax.memory.lookup import Hits, product_key_top_k

__all__ = [
    "MEMORIES",
    "Hits",
    "MemoryConfig",
    "ProductKeyMemory",
    "embedding_bag",
    "product_key_top_k",
    "row_products",
]

MEMORIES = {"product_key": ProductKeyMemory}
