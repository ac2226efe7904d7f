"""The dense baseline under a gradual magnitude mask: half of the weights at the end.

    python train.py --config=configs/masked.py

A few minutes on two CPU cores; results/comparison.csv has the figures to expect.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Prune along a cubic from a quarter to three quarters of the steps."""
    config = dense.get_config()
    config.masked = {
        "density": 0.5,
        "schedule": "cubic",
        "begin": 20,
        "end": 80,
        "every": 10,
    }
    return config
