import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sparsejax.config import to_dict
from sparsejax.train.main import main, parse

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.py")


COMPILED = []  # the programs that this process has compiled


@jax.monitoring.register_event_duration_secs_listener
def hear(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(seconds)


def run(capsys, *flags):
    """Exit status and the last line said on stderr."""
    status = main([f"--config={CONFIG}", *flags])
    return status, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.model.dept=3",
            "config.model.dept: no such field; did you mean 'depth'",
        ),
        ("--config.modle.depth=3", "config.modle: no such field; did you mean 'model'"),
        ("--config.model.depth=x", "config.model.depth=x: expected int"),
        ("--config.model.depth=-1", "config.model.depth=-1: must be positive"),
        ("--config.model.kv_heads=3", "config.model.kv_heads=3: must divide heads=4"),
        ("--config.data.seq_len=250", "config.data.seq_len=250: must be divisible by"),
        ("--config.model.ffn.per_token=9", "config.model.ffn.per_token=9"),
        ("--config.optim.name=adam", "config.optim.name='adam': no such name; did you"),
        ("--config.optim.warmup=900", "config.optim.warmup=900: must not exceed"),
        ("--config.masked.end=9000", "config.masked.end=9000"),
        ("--config.model.attention.pattern=stream", "did you mean 'streaming_llm'"),
        ("--config.mesh.tensor=3", "config.mesh: data=-1"),
        ("--config.mesh.tensor=8", "must divide axis 'g'"),
        ("--config.data.name=tiny_shakespear", "config.data.name='tiny_shakespear'"),
        ("--worker=3", "--worker=3: no such flag; see --help"),
        ("--config.seed", "--config.seed: needs a value"),
        ("--profile=5", "--profile=5: must be START:STOP"),
        ("--profile=9000:9003", "--profile=9000:9003: names no step of the run"),
        ("--aot=tpu:v9:2x2", "--aot=tpu:v9:2x2: no such TPU"),
        ("--aot=npu", "--aot=npu: no such platform"),
        ("--processes=2", "coordinator"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_compile(
    capsys, tmp_path, flag, message
):
    before = len(COMPILED)
    status, line = run(capsys, f"--workdir={tmp_path}", flag)
    assert status == 2
    assert line.startswith("error: ")
    assert message in line
    assert len(COMPILED) == before


def test_a_kernel_that_cannot_run_here_is_one_line(capsys, tmp_path):
    flag = "--config.model.attention.implementation=mosaic_tpu"
    status, line = run(capsys, f"--workdir={tmp_path}", flag)
    assert status == 2
    assert line.startswith("error: implementation='mosaic_tpu' needs a TPU")


def test_an_interrupt_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsejax.train.loop.train", interrupted)
    status, line = run(capsys, f"--workdir={tmp_path}")
    assert status == 130
    assert "start the same command again" in line


def test_a_compile_would_be_heard():
    before = len(COMPILED)
    jax.jit(lambda x: x + before)(1.0)
    assert len(COMPILED) == before + 1


def test_a_config_that_is_not_there_is_named(capsys):
    assert main(["--config=configs/nothing.py"]) == 2
    assert "--config=configs/nothing.py: no such file" in capsys.readouterr().err


def test_overrides_reach_the_config_with_and_without_an_equals_sign():
    flags = [f"--config={CONFIG}", "--config.model.depth=6", "--config.seed", "7"]
    _, config = parse(flags)
    assert (config.model.depth, config.seed) == (6, 7)


def test_a_section_can_be_left_out():
    _, config = parse([f"--config={CONFIG}", "--config.masked=none"])
    assert config.masked is None


def test_help_is_fast_and_lists_the_flags():
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--workdir" in text
    assert "--config.model.depth=8" in text


def test_the_config_of_a_workdir_is_readable_json(tmp_path):
    _, config = parse([f"--config={CONFIG}"])
    assert json.loads(json.dumps(to_dict(config)))["model"]["memory_layers"] == [2]
