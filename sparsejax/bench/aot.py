"""What the large configs need of hardware that is not there.

    python -m sparsejax.bench aot

in the environment that ``.ci/environment aot`` makes. Each row of ``results/aot.csv``
is one config's real training step compiled for one target, judged as
``train.py --aot=TARGET`` does: sizes are of one chip, collectives of one chip in one
step. ``--only=moe_8b`` measures some rows again and keeps the others.
"""

import argparse
import sys
from typing import Any, NamedTuple

import jax

from sparsejax.bench.table import markdown, provenance, read_rows, write_rows
from sparsejax.config import fingerprint
from sparsejax.sharding.hlo import KINDS
from sparsejax.sharding.targets import describe
from sparsejax.train.aot import Judgement, judge
from sparsejax.train.main import parse

GIB = 2**30
COLUMNS = {
    "config": "config",
    "overrides": "changed",
    "target": "target",
    "chips": "chips",
    "parameters_gib": "parameters, GiB",
    "optimizer_gib": "optimiser, GiB",
    "activations_gib": "the step's own, GiB",
    "total_gib": "total, GiB",
    "memory_gib": "of, GiB",
    "useful_tflops": "useful TFLOPs",
    "verdict": "verdict",
    "compile_seconds": "compiled in, s",
}


class Work(NamedTuple):
    """A config, and the hardware to compile it for."""

    config: str
    target: str
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its row from others."""
        return self.config, self.target, " ".join(self.overrides)


WORKS = (
    Work("quickstart", "tpu:v5e:2x4", ("mesh.expert=2", "mesh.fsdp=2")),
    Work("quickstart", "gpu:h200"),
    Work("dense_1b", "tpu:v5e:16x16"),
    Work("dense_1b", "gpu:h200"),
    Work("dense_1b", "gpu:h200", ("optim.accumulate=64",)),
    Work("moe_8b", "tpu:v5p:8x8x8"),
    Work("memory_128b", "tpu:v5p:8x8x8"),
)


def row(work: Work) -> dict[str, Any]:
    """Compile one config for one target."""
    flags = [f"--config.{override}" for override in work.overrides]
    _, config = parse([f"--config=configs/{work.config}.py", *flags])
    found = judge(config, describe(work.target))
    return {
        **dict(zip(("config", "target", "overrides"), work.key, strict=True)),
        "fingerprint": fingerprint(config)[:8],
        **_columns(found),
    }


def _columns(found: Judgement) -> dict[str, Any]:
    def gib(size: float) -> str:
        return f"{size / GIB:.3f}"

    sizes = ("parameters", "optimizer", "activations", "total", "memory")
    exchanged = sum(found.exchange.get(kind, 0) for kind in found.expected)
    return {
        "chips": found.chips,
        **{f"{name}_gib": gib(getattr(found, name)) for name in sizes},
        "compiler_tflops": f"{found.flops / 1e12:.3f}",
        "useful_tflops": f"{found.useful_flops / 1e12:.3f}",
        **{f"{kind}_gib": gib(found.collectives.get(kind, 0)) for kind in KINDS},
        "exchange_gib": gib(exchanged),
        "exchange_by_shapes_gib": gib(sum(found.expected.values())),
        "verdict": "fits" if found.fits else "does not fit",
        "compile_seconds": f"{found.seconds:.0f}",
    }


def main(argv: list[str]) -> int:
    """Compile everything, write the table and print it."""
    parser = argparse.ArgumentParser(prog="python -m sparsejax.bench aot")
    parser.add_argument("--only", help="a config, a target, or a part of their names")
    flags = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # look for no hardware
    kept = {(r["config"], r["target"], r["overrides"]): r for r in read_rows("aot")}
    about = provenance()
    for work in WORKS:
        if (flags.only or "") in " ".join(work.key):
            kept[work.key] = row(work) | about
            sys.stderr.write(f"{' '.join(work.key)}: {kept[work.key]['verdict']}\n")
            rows = [kept[w.key] for w in WORKS if w.key in kept]
            write_rows("aot", rows)
    rows = [kept[work.key] for work in WORKS if work.key in kept]
    sys.stdout.write(markdown(rows, COLUMNS) + "\n")
    return 0
