"""What a model costs: separate, honest numbers for parameters and FLOPs.

A parameter is *active* if a token uses it. A multiply-add is two FLOPs. Useful FLOPs
leave out what masks make zero and whatever the backward pass computes again; they are
what the method needs, not what a machine happens to execute.
"""

import math
import resource
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from sparsejax.attention import METHODS, BlockMask, Sizes, Work
from sparsejax.moe import MoEConfig
from sparsejax.nn.config import LayerSpec, ModelConfig, runs
from sparsejax.tree import variables
from sparsejax.typing import PyTree

__all__ = ["Cost", "attention_masks", "cost"]


class Cost(NamedTuple):
    """Parameters of a model, and FLOPs of one token's training step."""

    total: int
    active: float  # parameters that a token uses
    nonzero: int
    useful_flops: float  # forward and backward, a token
    attention_density: float  # live query-key pairs over causal ones, mean over layers


def attention_masks(config: ModelConfig, length: int) -> dict[str, BlockMask]:
    """Build each different mask of a pattern, named after the layers it is for."""
    found: list[tuple[list[int], LayerSpec]] = []
    for index in range(config.depth):
        spec = config.layer(index)
        if spec.attention.selector is not None:
            continue  # the data decide
        for layers, other in found:
            if other.attention == spec.attention:
                layers.append(index)
                break
        else:
            found.append(([index], spec))
    return {
        f"{spec.attention.pattern}, layers {', '.join(map(str, layers))}": _mask(
            spec, length
        )
        for layers, spec in found
    }


def _mask(spec: LayerSpec, length: int) -> BlockMask:
    attention = spec.attention
    return BlockMask.from_pattern(
        attention.build(),
        q_len=length,
        kv_len=length,
        block_q=attention.block_q,
        block_kv=attention.block_kv,
    )


def live_pairs(mask: BlockMask) -> int:
    """Count the query-key pairs that a mask of one batch row and one head admits."""
    count, full = (np.asarray(x)[0, 0] for x in (mask.count, mask.full))
    ids = np.asarray(mask.ids)[0, 0]
    pattern = mask.pattern
    if pattern is None:
        raise ValueError("live_pairs counts masks that were built from a pattern")
    pairs = 0
    q, k = np.arange(mask.block_q)[:, None], np.arange(mask.block_kv)[None]
    for row, (of, first, last) in enumerate(zip(ids, full, count, strict=True)):
        i = q + row * mask.block_q
        pairs += int(first) * int((i < mask.q_len).sum()) * mask.block_kv
        for block in of[first:last]:
            j = k + int(block) * mask.block_kv
            real = (i < mask.q_len) & (j < mask.kv_len)
            pairs += int(np.sum(np.asarray(pattern(i, j)) & real))
    return pairs


def _work(config: ModelConfig, spec: LayerSpec, length: int) -> Work:
    """Count the pairs that meet in a layer, and what choosing them costs."""
    attention = spec.attention
    if attention.selector is None:
        return Work(live_pairs(_mask(spec, length)), 0.0)
    width = attention.widths(config.width, config.heads).keys
    sizes = Sizes(config.width, config.heads, config.kv_heads, width)
    work = attention.options.work(length, attention.block_kv, sizes)
    if METHODS[attention.selector].patterned:
        work = work._replace(pairs=work.pairs + live_pairs(_mask(spec, length)))
    return work


def _active_share(variable: nnx.Variable, spec: LayerSpec) -> float:
    """Give the share of a parameter that a token uses, from what it says of itself."""
    about, config = variable.get_metadata(), spec.feed_forward
    letters = about["axes"].split()
    if isinstance(config, MoEConfig) and "e" in letters and len(letters) > 3:
        return config.per_token / config.experts  # of l e d f, not of the router
    if "reads" in about:
        slots = variable.get_value().shape[-2]
        return min(1.0, about["reads"] * about.get("readers", 1) / slots)
    return 1.0


def cost(
    config: ModelConfig,
    params: PyTree,
    *,
    length: int,
    live: Mapping[str, float] | None = None,
) -> Cost:
    """Count parameters and FLOPs.

    Args:
        config: the model's.
        params: its parameters, or their shapes; with ``axes`` letters.
        length: tokens of a sequence.
        live: density of the parameters that are masked, by path.
    """
    total, nonzero, active, useful = 0, 0.0, 0.0, 0.0
    for path, variable in variables(params).items():
        shape, density = variable.get_value().shape, (live or {}).get(path, 1.0)
        size = math.prod(shape)
        share = _active_share(variable, _spec_at(config, path))
        if path == "embedding" and not config.tied:
            share = 1 / shape[0]  # one row is read
        total += size
        nonzero += size * density
        active += size * share
        # An embedding that is not also the unembedding is read, not multiplied.
        if path != "embedding" or config.tied:
            useful += size * share * density
    works = [_work(config, config.layer(x), length) for x in range(config.depth)]
    pairs = [work.pairs for work in works]
    widths = config.attention.widths(config.width, config.heads)
    attention = 2 * config.heads * sum(widths) * sum(pairs) / length
    choosing = sum(work.choosing for work in works) / length
    return Cost(
        total=total,
        active=active,
        nonzero=round(nonzero),
        useful_flops=3 * (2 * useful + attention) + choosing,
        attention_density=float(np.mean(pairs)) / (length * (length + 1) // 2),
    )


def _spec_at(config: ModelConfig, path: str) -> LayerSpec:
    """Find the layer that a path such as ``stacks/0/blocks/1/moe/up`` belongs to."""
    parts = path.split("/")
    if parts[0] != "stacks":
        return config.layer(0)
    return runs(config)[int(parts[1])].period[int(parts[3])]


def peak_bytes() -> int | None:
    """Give the most memory the process has held, on its device if that can tell."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return statistics.get("peak_bytes_in_use")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
