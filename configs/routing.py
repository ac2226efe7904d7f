"""The dense baseline with the Routing Transformer: clusters of keys in half the heads.

    python train.py --config=configs/routing.py

A few minutes on two CPU cores. The other half of the heads reads a window of 64 tokens,
which is also the most that a query reads of its cluster. Centroids move ten times as
fast as in the paper: the run is shorter still.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Sixteen clusters in one of two key heads, a window in the other."""
    config = dense.get_config()
    config.model.attention.selector = "routing"
    config.model.attention.selection = {
        "clusters": 16,
        "top": 64,
        "local": 1,
        "decay": 0.99,
    }
    return config
