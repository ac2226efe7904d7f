"""The command line of ``train.py``: flags and a config, then a run or an AOT report.

JAX and the rest are imported late, so that ``--help`` and a wrong flag answer at once.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from pallas_kernels import KernelError
from sparsejax.config import ConfigError, convert, fingerprint, override, read

OVERRIDE = re.compile(r"--config\.([\w.]+?)(?:=(.*))?")


def parser() -> argparse.ArgumentParser:
    """Describe the flags; any ``--config.path=value`` is an override besides."""
    flags = argparse.ArgumentParser(
        prog="train.py",
        allow_abbrev=False,
        description="Train a model, or compile its step for absent hardware.",
        epilog="Any field of the config is a flag: --config.model.depth=8.",
    )
    flags.add_argument("--config", required=True, help="a file with get_config()")
    flags.add_argument(
        "--workdir", help="where the run lives (default: runs/CONFIG-FINGERPRINT)"
    )
    flags.add_argument("--profile", metavar="START:STOP", help="trace these steps")
    flags.add_argument(
        "--aot", metavar="TARGET", help="compile only: tpu:v5p:8x8x8, gpu:h200, …"
    )
    flags.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    flags.add_argument("--processes", type=int, help="how many there are")
    flags.add_argument("--process_id", type=int, help="which of them this is")
    return flags


def parse(argv: list[str]) -> tuple[argparse.Namespace, Any]:
    """Read the flags and the config, overrides applied.

    Raises:
        ConfigError: if the config, an override or a flag is not legal.
    """
    from sparsejax.train.config import Config  # noqa: PLC0415

    known, rest = parser().parse_known_args(argv)
    values = read(known.config)
    rest = iter(rest)
    for flag in rest:
        match = OVERRIDE.fullmatch(flag)
        if match is None:
            raise ConfigError(f"{flag}: no such flag; see --help")
        path, text = match.groups()
        if text is None:
            text = next(rest, None)
        if text is None:
            raise ConfigError(f"{flag}: needs a value, {flag}=…")
        override(Config, values, path, text)
    return known, convert(Config, values)


def main(argv: list[str] | None = None) -> int:
    """Run; 0 if the job was done, 1 if it failed, 2 if it could not begin.

    It is 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(flag.startswith("--aot") for flag in argv):
        # Read when JAX is imported: look for no hardware, only for its compilers.
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    try:
        flags, config = parse(argv)
        return _main(flags, config)
    except (ConfigError, KernelError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(
            "interrupted; start the same command again to go on from the last"
            " checkpoint, or to begin if there is none\n"
        )
        return 130


def _main(flags: argparse.Namespace, config: Any) -> int:
    if flags.aot is not None:
        from sparsejax.train.aot import report  # noqa: PLC0415

        return report(config, flags.aot)
    from sparsejax.train.checkpoint import CheckpointError  # noqa: PLC0415
    from sparsejax.train.distributed import initialize, together  # noqa: PLC0415
    from sparsejax.train.loop import NonFiniteError, train  # noqa: PLC0415
    from sparsejax.train.workdir import DiskError, format_summary  # noqa: PLC0415

    process = initialize(flags.coordinator, flags.processes, flags.process_id)
    file, _, given = flags.config.partition(".py:")
    name = "-".join(filter(None, (Path(file).stem, given)))
    name = f"{name}-{fingerprint(config)[:8]}"
    workdir = flags.workdir or Path("runs") / name
    plain = (CheckpointError, DiskError, NonFiniteError)
    try:
        with together(process, plain=plain):
            summary = train(config, workdir, profile=flags.profile, process=process)
    except plain as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if process.index == 0:
        sys.stdout.write(format_summary(summary) + "\n")
    return 0
