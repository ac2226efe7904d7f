"""Every experiment can be built, is what it was, and takes two steps at toy size."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.config import convert, read, to_dict
from sparsejax.data import Batch
from sparsejax.train.config import Config
from sparsejax.train.step import Step

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem[0] != "_")


def values_of(name):
    return read(ROOT / "configs" / f"{name}.py")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_what_its_golden_file_says(name):
    found = to_dict(convert(Config, values_of(name)))
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    assert found == expected, f"if meant: python -m tests.test_configs {name}"


def test_checking_configs_touches_no_device():
    # Processes have to meet before any of them does; JAX refuses the setting after.
    # Nor does it wait for the makers of kernels, which take seconds to import.
    code = f"""
import sys
import jax
from sparsejax.config import convert, read
from sparsejax.train.config import Config
for name in {CONFIGS}:
    convert(Config, read(f"configs/{{name}}.py"))
jax.config.update("jax_num_cpu_devices", 3)
assert not {{"jax.experimental.mosaic", "jax.experimental.pallas"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def toy_size(values):
    """The same structure, small: every size shrinks, every choice stays."""
    block = values["model"]["attention"]["block_q"] = 8
    values["model"]["attention"]["block_kv"] = block
    values["data"] |= {"seq_len": 4 * block, "batch_size": 4}
    if selection := values["model"]["attention"].get("selection"):
        selection["top"] = min(selection["top"], 3)
    model = values["model"]
    groups = model["heads"] // model["kv_heads"]
    model |= {"width": 8 * groups, "heads": groups, "kv_heads": 1}
    # Every kind of layer once: compiling them is what takes the time.
    model["depth"] = min(model["depth"], 2)
    if values["model"]["attention"].get("dense_every"):
        values["model"]["attention"]["dense_every"] = 2
    if model.get("memory_layers"):
        model["memory_layers"] = (1,)
    model["ffn"]["hidden"] = 16
    if model["ffn"]["kind"] == "moe":
        model["ffn"]["experts"] = min(model["ffn"]["experts"], 8)
    if "sub_keys" in (model.get("memory") or ()):
        model["memory"] |= {"sub_keys": 8, "per_head": 4, "key_width": 8}
    if values.get("masked"):
        values["masked"] |= {"begin": 0, "end": 1, "every": 1}
    values["optim"]["warmup"] = 1
    values["mesh"] = {}
    values["train"] |= {"steps": 2, "loss_chunk": 0}
    return values


def toy_step(name):
    """A config's step at toy size, and a batch for it."""
    config = convert(Config, toy_size(values_of(name)))
    shape = config.data.batch_size, config.data.seq_len + 1
    tokens = np.random.default_rng(0).integers(0, 40, shape).astype(np.int32)
    at = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, np.ones(shape, np.int32), at))
    return Step(config, 40, np.ones(40, np.int32)), batch


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_traces_at_toy_size(name):
    step, batch = toy_step(name)
    state = jax.eval_shape(step.init, jax.random.key(0), batch)
    after, metrics = jax.eval_shape(step.train, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()


# Compiling each takes half a minute; the tests of the loop train one of every pillar.
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_takes_two_steps_at_toy_size(name):
    step, batch = toy_step(name)
    state = jax.jit(step.init)(jax.random.key(0), batch)
    before = jax.tree.map(np.array, state.params)
    train = jax.jit(step.train)
    for _ in range(2):
        state, metrics = train(state, batch)
    assert state.fault.tolist() == [-1, -1]
    assert abs(float(metrics["loss"]) - math.log(40)) < 2
    moved = jax.tree.map(lambda x, y: (x != np.asarray(y)).any(), before, state.params)
    assert all(jax.tree.leaves(moved))


def main(names):
    """Write the golden files again, after a change that was meant."""
    GOLDEN.mkdir(exist_ok=True)
    for name in names or CONFIGS:
        text = json.dumps(to_dict(convert(Config, values_of(name))), indent=1)
        (GOLDEN / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
