"""The dense baseline with DeepSeek sparse attention: an indexer chooses 64 of 256 keys.

    python train.py --config=configs/dsa.py

A few minutes on two CPU cores. With ``--config.model.attention.selection.stage=warmup``
attention stays dense while the indexer learns to follow it.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """An indexer of four small heads, trained beside the model by its own loss."""
    config = dense.get_config()
    config.model.attention.selector = "dsa"
    config.model.attention.selection = {
        "top": 64,
        "heads": 4,
        "width": 32,
        "rotated": 16,
    }
    return config
