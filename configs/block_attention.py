"""The dense baseline with block-sparse attention: four sinks and a window of 64.

    python train.py --config=configs/block_attention.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Attend to the first tokens and the near ones; everything else is dense."""
    config = dense.get_config()
    config.model.attention.pattern = "streaming_llm"
    config.model.attention.arguments = {"sinks": 4, "window": 64}
    return config
