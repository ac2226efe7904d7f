r"""The mixture of experts without a router: a token's id decides, and nothing learns.

    python train.py --config=configs/hash.py

A few minutes on two CPU cores; compare it with configs/moe.py, at as many parameters
and as many active ones. Balanced or clustered tables are made from a trained run:

    python -m sparsejax.convert table --workdir=RUN --kind=balanced --experts=4 \
        --out=balanced.npy
    python train.py --config=configs/hash.py --config.model.ffn.router=hash_table \
        --config.model.ffn.table=balanced.npy
"""

from ml_collections import ConfigDict

from configs import moe


def get_config() -> ConfigDict:
    """One of four experts, each as wide as the baseline's feed-forward."""
    config = moe.get_config()
    config.model.ffn.update({"router": "hash_random", "experts": 4, "per_token": 1})
    config.model.ffn.hidden = 384
    return config
