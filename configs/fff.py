"""The dense baseline with a tree of 16 leaves of 24 neurons in its third layer.

    python train.py --config=configs/fff.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect. It
trains by its soft path, all leaves as wide as the feed-forward that they replace;
``--config.model.memory.path=hard`` asks for one leaf.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """The tree stands in place of that layer's feed-forward."""
    config = dense.get_config()
    config.model.memory = {
        "kind": "fff",
        "depth": 4,
        "leaf_width": 24,
        "path": "soft",
        "activation": "gelu",
    }
    config.model.memory_layers = (2,)
    return config
