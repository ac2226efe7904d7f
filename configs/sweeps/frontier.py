"""Loss against size, data and kind of sparsity: dense, routed, masked, memory.

    python sweep.py --config=configs/sweeps/frontier.py --workers=2

Seven kinds, four sizes, three budgets of tokens, one seed: 84 runs of two layers.
docs/scaling.md fits laws to its rows, which predict the runs of ``frontier_next``.
"""

from configs import dense
from sparsejax.sweep import Sweep, product, token_budgets, variants

SIZES = {str(width): {"model.width": width} for width in (32, 48, 64, 96)}
BUDGETS = (1.25e5, 2.5e5, 5e5)
MEMORY = {
    "kind": "product_key",
    "sub_keys": 64,
    "heads": 4,
    "per_head": 16,
    "key_width": 64,
}


def experts(count):
    """Two experts of half the dense width are active."""
    return {"model.ffn": {"kind": "moe", "experts": count, "per_token": 2, "hidden": 1}}


def mask(density):
    """Dense at first; the rule below says when it is pruned."""
    return {"masked": {"density": density, "schedule": "cubic"}}


KINDS = {
    "dense": {},
    "8 experts": experts(8),
    "32 experts": experts(32),
    "50 % masked": mask(0.5),
    "75 % masked": mask(0.25),
    "90 % masked": mask(0.1),
    "memory": {"model.memory": MEMORY, "model.memory_layers": (1,)},
}


def hidden(values):
    """Three times the width, over all the experts that a token visits."""
    parts = values["model"]["ffn"].get("per_token", 1)
    return {"model.ffn.hidden": 3 * values["model"]["width"] // parts}


def rate(values):
    """The dense config's at its width; larger models learn with smaller steps."""
    return {"optim.learning_rate": 4e-3 * (128 / values["model"]["width"]) ** 0.5}


def pruning(values):
    """Prune from a quarter to three quarters of the steps, every fortieth of them."""
    if not values["masked"]:
        return {}
    steps = values["train"]["steps"]
    every = max(1, steps // 40)
    begin = steps // 4
    times = (3 * steps // 4 - begin) // every
    return {
        "masked.begin": begin,
        "masked.end": begin + times * every,
        "masked.every": every,
    }


def pace(values):
    """Evaluate five times, log forty times, save at the end."""
    steps = values["train"]["steps"]
    return {
        "train.eval_every": max(1, steps // 5),
        "train.log_every": max(1, steps // 40),
        "train.save_every": steps,
        "optim.warmup": max(1, steps // 10),
    }


RULES = (hidden, rate, pruning, pace)


def base():
    """The dense config with two layers and small batches: more steps for a token."""
    config = dense.get_config()
    config.model.depth, config.model.heads, config.model.kv_heads = 2, 2, 1
    config.data.seq_len, config.data.batch_size = 128, 4
    config.train.eval_batches = 48
    return config


def get_sweep() -> Sweep:
    """Every kind at every size with every budget."""
    axes = product(
        variants("kind", KINDS), variants("size", SIZES), token_budgets(BUDGETS)
    )
    return Sweep(base=base(), axes=axes, seeds=(0,), rules=RULES)
