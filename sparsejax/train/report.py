"""How a run ends: a summary, a text sample, the plots."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax import masked
from sparsejax.nn import Transformer
from sparsejax.nn.cost import attention_masks, cost, peak_bytes
from sparsejax.nn.generate import generate
from sparsejax.partition import BATCH
from sparsejax.train import expert_plots, mask_plots
from sparsejax.train.config import Config
from sparsejax.train.plots import write_plots
from sparsejax.train.step import State
from sparsejax.train.workdir import write_summary


def sample_text(
    model: Transformer,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int,
    seed: int = 0,
    **options: Any,
) -> str:
    """Return the prompt and its continuation, as far as the model's context goes.

    ``options`` are those of ``generate``.
    """
    ids = np.asarray(tokenizer.prompt(prompt), np.int32)
    if model.config.context_length is not None:
        tokens = min(tokens, model.config.context_length - len(ids))
    if tokens < 1:
        return prompt
    mesh = jax.sharding.get_abstract_mesh()
    rows = math.prod(mesh.shape.get(name, 1) for name in BATCH)  # one for each device
    key = jax.random.key(seed)
    draw = functools.partial(generate, tokens=tokens, key=key, **options)
    whole = jax.sharding.PartitionSpec()
    chosen = jax.jit(draw, out_shardings=whole)(model, np.tile(ids, (rows, 1)))
    return prompt + tokenizer.decode(np.asarray(chosen)[0])


def costs(config: Config, state: State) -> dict[str, Any]:
    """Count parameters and useful FLOPs of a trained state, masks included."""
    live = {}
    if config.masked is not None:
        masks = masked.masks_of(state.opt)
        found = jax.jit(masked.metrics)(masks)
        live = {path: float(np.mean(found[f"masked/density/{path}"])) for path in masks}
    counted = cost(config.model, state.params, length=config.data.seq_len, live=live)
    return {
        "parameters_total": counted.total,
        "parameters_active": round(counted.active),
        "parameters_nonzero": counted.nonzero,
        "useful_flops_per_token": round(counted.useful_flops),
        "attention_density": counted.attention_density,
        "peak_memory_bytes": peak_bytes(),
    }


def picture(config: Config) -> dict[str, np.ndarray]:
    """Draw each attention mask by blocks: 0 dead, 1 partial, 2 full."""
    return {
        name: np.asarray(mask.kinds())[0, 0]
        for name, mask in attention_masks(config.model, config.data.seq_len).items()
    }


def finish(
    config: Config,
    workdir: Path,
    summary: dict[str, Any],
    masks: dict[str, np.ndarray] | None = None,
    experts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw the plots, write ``summary.json``, and return it with the plots' paths.

    Args:
        config: of the run.
        workdir: of the run.
        summary: what is known already.
        masks: their pictures, as ``mask_plots.drawn`` makes them.
        experts: what they are for, as ``Routes.summed`` gives it.
    """
    more = {
        "masks": lambda _: mask_plots.masks_figure(masks or {}),
        "mask_changes": mask_plots.changes_figure,
        **expert_plots.figures(experts or {}),
    }
    paths = write_plots(workdir, picture(config), more=more)
    summary = summary | {"plots": [str(path) for path in paths]}
    write_summary(workdir, summary)
    return summary
