"""The dense baseline with one pool of 4096 values that two of its layers read.

    python train.py --config=configs/memory_plus.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect.
Values are trained by rows: a step moves those that its tokens have read, and no others.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Layers in the middle read the pool in place of their feed-forward."""
    config = dense.get_config()
    config.model.memory = {
        "kind": "memory_plus",
        "sub_keys": 64,
        "heads": 4,
        "per_head": 16,
        "key_width": 64,
    }
    config.model.memory_layers = (1, 2)
    config.optim.tables = "adam"
    return config
