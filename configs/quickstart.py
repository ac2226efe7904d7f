"""All pillars at once: the model to begin with.

Block-sparse attention, routed experts, a product-key memory, masked weights.

    python train.py --config=configs/quickstart.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect.
"""

from ml_collections import ConfigDict

from configs import block_attention, masked, memory, moe


def get_config() -> ConfigDict:
    """Take each pillar's part from the config that has it alone."""
    config = block_attention.get_config()
    config.model.ffn = moe.get_config().model.ffn
    config.model.memory = memory.get_config().model.memory
    config.model.memory_layers = (2,)
    config.masked = masked.get_config().masked
    return config
