"""The dense baseline with native sparse attention: compressed, selected, near keys.

    python train.py --config=configs/nsa.py

A few minutes on two CPU cores. The published sizes, a budget of 16 blocks and a window
of 512, are for texts of thousands of tokens; here both are an eighth of the text.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Four blocks of 16 keys, 15 compressed keys, and a window of 32."""
    config = dense.get_config()
    config.model.attention.block_kv = 16
    config.model.attention.selector = "nsa"
    config.model.attention.selection = {"top": 4, "window": 32}
    return config
