"""PyTorch's attentions over the same arrays and patterns, for comparison."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    create_block_mask,
    flex_attention,
)

from sparsejax.attention import Pattern
from sparsejax.typing import Array

__all__ = ["flex", "sdpa"]


def sdpa(
    arrays: tuple[Array, ...], pattern: Pattern, *, length: int, backward: bool
) -> Callable[[], Any]:
    """Scaled-dot-product attention under a dense boolean mask."""
    at = np.arange(length)
    visible = torch.from_numpy(pattern(at[:, None], at[None]))
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = _tensors(arrays, backward=backward)
    if not backward:
        return lambda: attend(q, k, v, attn_mask=visible)

    def run() -> Any:
        out = attend(q, k, v, attn_mask=visible)
        return torch.autograd.grad(out.sum(), (q, k, v))

    return run


def flex(
    arrays: tuple[Array, ...], pattern: Pattern, *, length: int, block: int = 128
) -> Callable[[], Any]:
    """FlexAttention, compiled, under the same block mask; forward only."""
    mask = create_block_mask(
        lambda _batch, _head, i, j: pattern(i, j),
        *(None, None, length, length),
        device="cpu",
        BLOCK_SIZE=block,
    )
    attend = torch.compile(flex_attention, dynamic=False)
    q, k, v = _tensors(arrays, backward=False)

    @torch.no_grad()
    def run() -> Any:
        return attend(q, k, v, block_mask=mask)

    return run


def _tensors(arrays: tuple[Array, ...], *, backward: bool) -> list[torch.Tensor]:
    """Copy [b, t, h, c] to PyTorch's [b, h, t, c]."""
    return [
        torch.tensor(np.asarray(x).transpose(0, 2, 1, 3)).requires_grad_(backward)
        for x in arrays
    ]
