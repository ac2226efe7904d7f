"""One run larger than all of ``frontier_small``, with more tokens: it was predicted.

    python sweep.py --config=configs/sweeps/frontier_next.py

A minute or two on two CPU cores; docs/scaling.md has the prediction and what came.
"""

from configs.sweeps import frontier, frontier_small
from sparsejax.sweep import Sweep, product, token_budgets, variants


def get_sweep() -> Sweep:
    """Half as wide again, and twice the tokens, as the largest run that was fitted."""
    axes = product(
        variants("kind", {"dense": {}}),
        variants("size", {"96": {"model.width": 96}}),
        token_budgets([8e5]),
    )
    return Sweep(base=frontier_small.base(), axes=axes, rules=frontier.RULES)
