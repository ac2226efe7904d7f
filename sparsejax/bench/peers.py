"""PyTorch's attentions over the same arrays and patterns, for comparison."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    BlockMask,
    create_block_mask,
    flex_attention,
)

from sparsejax.attention import Pattern
from sparsejax.typing import Array

__all__ = ["flex", "flex_on_gpu", "sdpa", "wait"]


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


def flex_on_gpu(
    arrays: tuple[Array, ...], *, live: np.ndarray, block: int, backward: bool
) -> Callable[[], Any]:
    """FlexAttention, compiled, on live blocks "h i j" that are causal inside.

    Only the diagonal blocks evaluate the rule, as in ours.
    """
    diagonal = np.eye(live.shape[1], dtype=bool)
    lists: list[torch.Tensor] = []
    for part in (live & diagonal, live & ~diagonal):
        ids = np.argsort(~part, axis=2, kind="stable")
        tables = (part.sum(2)[None], ids[None])
        lists += [torch.tensor(x, dtype=torch.int32, device="cuda") for x in tables]
    mask = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=block, mask_mod=lambda _batch, _head, i, j: i >= j
    )
    q, k, v, do = (
        torch.tensor(
            np.asarray(x.astype("float32")).transpose(0, 2, 1, 3),
            dtype=torch.bfloat16,
            device="cuda",
        )
        for x in arrays
    )
    q, k, v = (x.requires_grad_(backward) for x in (q, k, v))

    def run() -> Any:
        out = _compiled_flex(q, k, v, block_mask=mask)
        return torch.autograd.grad(out, (q, k, v), do) if backward else out

    return run


torch._dynamo.config.recompile_limit = 256  # each length is a program of its own
_compiled_flex = torch.compile(flex_attention, dynamic=False)


def wait(_result: Any) -> None:
    """Wait for the GPU."""
    torch.cuda.synchronize()


def _tensors(arrays: tuple[Array, ...], *, backward: bool) -> list[torch.Tensor]:
    """Copy [b, t, h, c] to PyTorch's [b, h, t, c]."""
    return [
        torch.tensor(np.asarray(x).transpose(0, 2, 1, 3)).requires_grad_(backward)
        for x in arrays
    ]
