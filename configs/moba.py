"""The dense baseline with mixture of block attention: three blocks of 32 keys of eight.

    python train.py --config=configs/moba.py

A few minutes on two CPU cores. The selector alone can be put on any config, with
``--config.model.attention.selector=moba``.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Every query reads its own block and the two best before it."""
    config = dense.get_config()
    config.model.attention.block_kv = 32
    config.model.attention.selector = "moba"
    config.model.attention.selection = {"top": 3}
    return config
