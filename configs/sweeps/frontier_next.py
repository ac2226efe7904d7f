"""Three runs, larger than all of ``frontier``, with more tokens: predicted.

    python sweep.py --config=configs/sweeps/frontier_next.py

docs/scaling.md has the predictions, made before, and what came.
"""

from configs.sweeps import frontier
from sparsejax.sweep import Sweep, product, token_budgets, variants


def get_sweep() -> Sweep:
    """A third as wide again, and twice the tokens, as the largest that were fitted."""
    kinds = ("dense", "32 experts", "75 % masked")
    axes = product(
        variants("kind", {kind: frontier.KINDS[kind] for kind in kinds}),
        variants("size", {"128": {"model.width": 128}}),
        token_budgets([1e6]),
    )
    return Sweep(base=frontier.base(), axes=axes, rules=frontier.RULES)
