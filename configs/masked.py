"""The dense baseline under a gradual magnitude mask: half of the weights at the end.

    python train.py --config=configs/masked.py

Two CPU cores, about two minutes. Compare with results/comparison.csv.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Prune along a cubic from a quarter to three quarters of the steps."""
    config = dense.get_config()
    config.masked = {
        "density": 0.5,
        "schedule": "cubic",
        "begin": 100,
        "end": 300,
        "every": 20,
    }
    return config
