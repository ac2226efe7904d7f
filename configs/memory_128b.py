"""A billion dense parameters, and a pool of 128 billion that every fourth layer reads.

    python train.py --config=configs/memory_128b.py --config.data.name=c4/en

Judge it without the hardware first:

    python train.py --config=configs/memory_128b.py --aot=tpu:v5p:8x8x8
"""

from ml_collections import ConfigDict

from configs import dense_1b


def get_config() -> ConfigDict:
    """Cut 62 million values by rows over ``tensor`` and by columns over ``fsdp``.

    Each of 512 chips holds 0.25 billion of them, and moves the rows that were read.
    """
    config = dense_1b.get_config()
    config.data.batch_size = 64  # every chip sorts all reads of a step
    config.model.memory = {
        "kind": "memory_plus",
        "sub_keys": 7904,
        "heads": 8,
        "per_head": 32,
        "key_width": 256,
    }
    config.model.memory_layers = (3, 7, 11, 15, 19)
    config.optim.tables = "adam"
    config.mesh.update(data=1, fsdp=64, tensor=8)
    return config
