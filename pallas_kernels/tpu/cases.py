"""The shapes that matter: compiled ahead of time for every generation of TPUs."""

from typing import NamedTuple

__all__ = ["CASES", "GENERATIONS", "Case"]

GENERATIONS = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


class Case(NamedTuple):
    """One call of block-sparse attention; lengths and blocks are in tokens."""

    length: int
    heads: int
    key_heads: int
    width: int
    block_q: int
    block_kv: int
    dtype: str = "bfloat16"
    batch: int = 1
    queries: int | None = None  # None is as many as keys
    mask: str = "causal"  # causal, window, heads, elements or grants
    extras: bool = False  # segments, soft cap and bias


CASES = {
    "plain": Case(4096, 8, 8, 128, 128, 128),
    "grouped": Case(4096, 8, 2, 64, 128, 128, batch=2),
    "float32": Case(4096, 8, 2, 128, 256, 256, "float32"),
    "large_blocks": Case(8192, 8, 2, 128, 512, 512),
    "largest_blocks": Case(8192, 4, 4, 128, 1024, 1024),
    "small_blocks": Case(2048, 4, 4, 128, 8, 16),
    "odd_blocks": Case(2000, 4, 4, 80, 100, 60, "float32"),
    "narrow_heads": Case(2048, 4, 2, 32, 128, 64),
    "wide_heads": Case(2048, 4, 2, 256, 128, 128),
    "patterns_by_head": Case(4096, 8, 2, 128, 128, 128, mask="heads"),
    "extras": Case(4096, 8, 2, 128, 256, 256, batch=2, extras=True),
    "elements": Case(2048, 4, 2, 128, 128, 128, mask="elements", extras=True),
    "grants": Case(4096, 8, 2, 128, 128, 64, mask="grants"),
    "decode": Case(32768, 16, 2, 128, 1, 512, batch=2, queries=1),
    "decode_alone": Case(4096, 4, 4, 64, 1, 128, "float32", queries=1),
    "long": Case(131072, 8, 2, 128, 512, 512, mask="window"),
    "several_calls": Case(65536, 4, 4, 64, 128, 128),
}
