"""The dense baseline: every layer dense, as many useful FLOPs as the sparse models.

    python train.py --config=configs/dense.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All the other small configs are edited copies of this one."""
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                "name": "english",
                "seq_len": 256,
                "batch_size": 8,
                "tokenizer": "bytes",
            },
            "model": {
                "depth": 4,
                "width": 128,
                "heads": 4,
                "kv_heads": 2,
                "attention": {
                    "pattern": "causal",
                    "arguments": {},
                    "block_q": 64,
                    "block_kv": 64,
                },
                "ffn": {"kind": "gated", "hidden": 384},
                "memory": None,
                "memory_layers": (),
            },
            "masked": None,
            "optim": {
                "name": "adamw",
                "learning_rate": 4e-3,
                "schedule": "cosine",
                "warmup": 10,
                "weight_decay": 0.1,
                "clip": 1.0,
            },
            "mesh": {"data": -1},
            "train": {
                "steps": 100,
                "log_every": 5,
                "eval_every": 25,
                "eval_batches": 24,
                "save_every": 25,
            },
        }
    )
