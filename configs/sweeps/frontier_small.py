"""A corner of the frontier: three small sizes, three budgets, dense and masked.

    python sweep.py --config=configs/sweeps/frontier_small.py

Twelve runs of two thin layers, about a quarter of an hour on two CPU cores;
docs/scaling.md fits a law to its rows, which predicts the run of ``frontier_next``.
"""

from configs.sweeps import frontier
from sparsejax.sweep import Sweep, product, token_budgets, variants

SIZES = {
    "16": {"model.width": 16},
    "32": {"model.width": 32},
    "64": {"model.width": 64},
}
BUDGETS = (1e5, 2e5, 4e5)


def base():
    """The frontier's runs with two layers and short rows."""
    config = frontier.get_sweep().base
    config.model.depth, config.model.heads, config.model.kv_heads = 2, 2, 1
    config.data.seq_len = 64
    return config


def get_sweep() -> Sweep:
    """Dense runs at every size and budget, masked ones with the middle budget."""
    dense = product(
        variants("kind", {"dense": {}}), variants("size", SIZES), token_budgets(BUDGETS)
    )
    masked = product(
        variants("kind", {"75 % masked": frontier.mask(0.25)}),
        variants("size", SIZES),
        token_budgets(BUDGETS[1:2]),
    )
    return Sweep(base=base(), axes=dense + masked, rules=frontier.RULES)
