"""The mixture of experts with ReLU routing: how many answer a token is learned.

    python train.py --config=configs/remoe.py

A few minutes on two CPU cores; compare it with configs/moe.py. The penalty starts at
next to nothing and grows until a mean token visits two experts.
"""

from ml_collections import ConfigDict

from configs import moe


def get_config() -> ConfigDict:
    """ReMoE taxes crowded experts itself, so no other balancing loss is needed."""
    config = moe.get_config()
    config.model.ffn.update({"router": "remoe", "balance_weight": 0.0})
    return config
