"""Selectors: which keys a query reads, decided by the data.

A selector is a pure function ``(q, k, *, place, block_kv, …) -> BlockMask`` of queries
"b t h c" and keys "b s g c": it scores, and ends in the best allowed blocks. It reads
no key after a query's own, whether the keys are those of a sequence or of a partly
filled cache: ``place.q_offset`` is the first query's position, and what lies past the
last is not there. A method with parameters, losses, biases or branches is a mixer
besides (``context.py`` has the contract). A member is a file with both, and a row in
each table below.
"""

import functools
from collections.abc import Callable

from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selectors.biformer import (
    BiFormer,
    BiFormerOptions,
    biformer,
)
from sparsejax.attention.selectors.dma import DMA, DMAOptions, dma
from sparsejax.attention.selectors.dsa import DSA, DSAOptions, dsa, dsa_select
from sparsejax.attention.selectors.llsa import LLSA, LLSAOptions
from sparsejax.attention.selectors.misa import MISAOptions, misa
from sparsejax.attention.selectors.moba import MoBA, MoBAOptions, moba
from sparsejax.attention.selectors.nsa import NSA, NSAOptions, nsa
from sparsejax.attention.selectors.persistent import (
    PersistentMemory,
    PersistentMemoryOptions,
)
from sparsejax.attention.selectors.plain import (
    Method,
    Patterned,
    Sizes,
    Work,
)
from sparsejax.attention.selectors.routing import (
    Centroids,
    Routing,
    RoutingOptions,
    moved,
    routing,
)

__all__ = [
    "METHODS",
    "SELECTORS",
    "Centroids",
    "Method",
    "Patterned",
    "Sizes",
    "Work",
    "moved",
]

SELECTORS: dict[str, Callable[..., BlockMask]] = {
    "biformer": biformer,
    "dma": dma,
    "dsa": dsa,
    "misa": misa,
    "moba": moba,
    "nsa": nsa,
    "routing": routing,
}

METHODS: dict[str, Method] = {
    "biformer": Method(BiFormerOptions, BiFormer, causal=False),
    "dma": Method(DMAOptions, DMA),
    "dsa": Method(DSAOptions, functools.partial(DSA, dsa_select), latent=True),
    "llsa": Method(LLSAOptions, LLSA, causal=False),
    "misa": Method(MISAOptions, functools.partial(DSA, misa), latent=True),
    "moba": Method(MoBAOptions, MoBA, latent=True),
    "nsa": Method(NSAOptions, NSA),
    "persistent_memory": Method(
        PersistentMemoryOptions, PersistentMemory, patterned=True
    ),
    "routing": Method(RoutingOptions, Routing),
}
