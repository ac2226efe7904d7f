"""The dense baseline with 4096 experts of one neuron in its third layer.

    python train.py --config=configs/peer.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect. A
token runs 64 experts; they are trained by rows: a step moves those that its tokens have
run, and no others.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """The experts stand in place of that layer's feed-forward."""
    config = dense.get_config()
    config.model.memory = {
        "kind": "peer",
        "sub_keys": 64,
        "heads": 4,
        "per_head": 16,
        "key_width": 64,
    }
    config.model.memory_layers = (2,)
    config.optim.tables = "adam"
    return config
