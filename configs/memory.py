"""The dense baseline with a product-key memory of 4096 slots in its third layer.

    python train.py --config=configs/memory.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """The memory stands in place of that layer's feed-forward."""
    config = dense.get_config()
    config.model.memory = {
        "kind": "product_key",
        "sub_keys": 64,
        "heads": 4,
        "per_head": 16,
        "key_width": 64,
    }
    config.model.memory_layers = (2,)
    return config
