"""``python -m sparsejax.bench NAME``: measure, write ``results/``, print a table."""

import importlib
import sys

from sparsejax.config import near

BENCHES = (
    "aot",
    "attention",
    "attention_gpu",
    "bits",
    "cached",
    "claims",
    "comparison",
    "costs",
    "decode",
    "facts",
    "finetuned",
    "flips",
    "forgetting",
    "frontier",
    "interop",
    "masked",
    "masked_gpu",
    "memory",
    "methods",
    "moe",
    "recall",
    "routers",
    "selectors",
    "train",
)


def main(argv: list[str]) -> int:
    """Run the benchmark that is named first; the rest are its own flags."""
    if not argv or argv[0] not in BENCHES:
        given = argv[0] if argv else ""
        sys.stderr.write(f"bench {given!r}: no such name{near(given, BENCHES)}\n")
        return 2
    return importlib.import_module(f"sparsejax.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
