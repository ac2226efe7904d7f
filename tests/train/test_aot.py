import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sparsejax.config import ConfigError
from sparsejax.sharding.targets import Target, describe
from sparsejax.train.aot import judge, text_of
from tests.train import toy

ROOT = Path(__file__).parents[2]
SMALL = {"memory": None, "memory_layers": ()}


@pytest.mark.slow
def test_a_judgement_counts_what_one_chip_holds():
    config = toy.toy(
        mesh={"data": 2, "fsdp": 2, "expert": 2},
        model=SMALL
        | {
            "remat": "full",
            "ffn": toy.TOY["model"]["ffn"]
            | {"exchange": "all_to_all", "exchange_factor": 1.5},
        },
        optim={"accumulate": 2},
    )
    target = Target("cpu", jax.devices(), memory=2**30)
    found = judge(config, target)
    alone = judge(toy.toy(model=SMALL), Target("cpu", jax.devices()[:1], memory=2**30))
    assert found.chips == 8
    # Two moments a parameter, a mask of a byte for some, and a few counters.
    assert 2 * found.parameters < found.optimizer < 2.3 * found.parameters
    assert alone.parameters / 4 < found.parameters < alone.parameters
    assert found.total > found.parameters + found.optimizer
    assert found.useful_flops == pytest.approx(alone.useful_flops / 8)
    assert found.fits
    assert found.collectives["all-gather"] > 0
    assert alone.collectives == alone.exchange == alone.expected == {}
    # Loops over micro-batches and layers, and what is computed again, are all counted.
    assert found.exchange["all-to-all"] == found.expected["all-to-all"] > 0
    assert "exchange: all-to-all" in text_of("cpu", found)


def test_what_does_not_fit_is_said_so():
    target = Target("cpu", jax.devices()[:1], memory=1000)
    found = judge(toy.toy(**toy.LEAST), target)
    assert not found.fits
    assert "verdict: DOES NOT FIT" in text_of("cpu", found)


def test_a_mesh_that_does_not_match_the_target_is_refused():
    with pytest.raises(ConfigError, match="does not match 8 devices"):
        judge(toy.toy(mesh={"tensor": 3}), Target("cpu", jax.devices(), 2**30))


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'sparsejax\[aot\]'"):
        describe("tpu:v5e:2x2")


def test_a_misspelt_target_ends_in_one_line():
    with pytest.raises(ConfigError, match=r"tpu:v5q:8x8x8: no such TPU; did you mean"):
        describe("tpu:v5q:8x8x8")
    with pytest.raises(ConfigError, match=r"gpu:h20: no such GPU; did you mean 'h200'"):
        describe("gpu:h20")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "flags"),
    [
        ("tpu:v5e:2x4", ["--config.mesh.expert=2", "--config.mesh.fsdp=2"]),
        ("tpu:v5p:2x2x2", ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]),
        ("gpu:h200", []),
    ],
)
def test_the_quickstart_step_compiles_for_hardware_that_is_not_there(target, flags):
    command = [sys.executable, "train.py", "--config=configs/quickstart.py"]
    command += [f"--aot={target}", *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("verdict: fits")
