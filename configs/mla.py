"""The dense baseline with latent attention: one narrow vector a token is all it caches.

    python train.py --config=configs/mla.py

A few minutes on two CPU cores. Beside configs/dense.py it has 2 % more parameters in
its attention and keeps half as many numbers for each token, 64 instead of 128 a layer.
DeepSeek-V2 and V3 have it besides routed and shared experts: configs/gpt_oss.py says
which router.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Keys of sixteen channels from the narrow vector and sixteen rotated ones."""
    config = dense.get_config()
    config.model.kv_heads = config.model.heads
    config.model.attention.latent = {
        "kv_rank": 48,
        "plain_width": 16,
        "rotated_width": 16,
        "value_width": 32,
    }
    return config
