"""A sweep of four points that a fake entry runs in no time."""

from ml_collections import ConfigDict

from sparsejax.sweep import Sweep, axis, product, token_budgets


def base():
    return ConfigDict(
        {
            "data": {"seq_len": 16, "batch_size": 2},
            "model": {
                "depth": 1,
                "width": 16,
                "heads": 2,
                "kv_heads": 1,
                "attention": {"block_q": 8, "block_kv": 8},
                "ffn": {"kind": "gated", "hidden": 16},
            },
            "masked": None,
            "optim": {"name": "adamw", "learning_rate": 0.01},
            "train": {"steps": 10},
        }
    )


def get_sweep():
    axes = product(axis("model.width", [16, 32]), token_budgets([320, 640]))
    return Sweep(base=base(), axes=axes)
