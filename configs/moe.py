"""The dense baseline with routed experts: two of eight, softmax top-k, dropless.

    python train.py --config=configs/moe.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Two experts of half the baseline's hidden width are active for each token."""
    config = dense.get_config()
    config.model.ffn = {
        "kind": "moe",
        "experts": 8,
        "per_token": 2,
        "hidden": 192,
        "router": "softmax_top_k",
        "dispatcher": "grouped",
    }
    return config
