"""A model small enough to compile in seconds, with a member of every pillar."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.config import convert, fingerprint
from sparsejax.data import Batch
from sparsejax.partition import BATCH
from sparsejax.sharding.mesh import make_mesh, shardings
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.config import Config
from sparsejax.train.distributed import Process
from sparsejax.train.step import Step, compiled

VOCABULARY = 48
ROWS, LENGTH = 16, 32
ALONE = Process(0, 1)

TOY = {
    "data": {"seq_len": LENGTH, "batch_size": ROWS},
    "model": {
        "depth": 2,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "attention": {
            "pattern": "streaming_llm",
            "arguments": {"sinks": 2, "window": 9},
            "block_q": 16,
            "block_kv": 16,
        },
        "ffn": {"kind": "moe", "experts": 8, "per_token": 2, "hidden": 16},
        "memory": {
            "kind": "product_key",
            "sub_keys": 8,
            "heads": 2,
            "per_head": 4,
            "key_width": 8,
        },
        "memory_layers": (1,),
    },
    "masked": {"density": 0.5, "begin": 4, "end": 12, "every": 4},
    "optim": {"name": "adamw", "learning_rate": 3e-3, "warmup": 2, "clip": 1.0},
    "train": {"steps": 20, "log_every": 2, "eval_every": 4, "save_every": 4},
}

# What concerns the step and not its layers is seen in the least of models.
LEAST = {
    "model": {
        "depth": 1,
        "ffn": {"kind": "gated", "hidden": 16},
        "memory": None,
        "memory_layers": (),
    },
    "masked": None,
}


def toy(**changes):
    """The toy config; ``section={field: value}`` updates a section."""
    values = {k: dict(v) for k, v in TOY.items()}
    for section, change in changes.items():
        values[section] = (
            change
            if change is None
            else {
                **values.get(section, {}),
                **change,
            }
        )
    return convert(Config, values)


def with_section(config, **changes):
    """Another config, ``section={field: value}`` changed."""
    sections = {
        name: type(getattr(config, name))(**change)
        if name == "mesh"
        else dataclasses.replace(getattr(config, name), **change)
        for name, change in changes.items()
    }
    return dataclasses.replace(config, **sections)


def batch(seed=0):
    """Two documents a row, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    at = np.arange(LENGTH + 1, dtype=np.int32)
    segments = np.where(at < 13, 1, np.where(at < 30, 2, 0)).astype(np.int32)
    positions = np.where(at < 13, at, np.where(at < 30, at - 13, 0)).astype(np.int32)
    shape = (ROWS, LENGTH + 1)
    return Batch(
        tokens,
        np.ascontiguousarray(np.broadcast_to(segments, shape)),
        np.ascontiguousarray(np.broadcast_to(positions, shape)),
    )


PROGRAMS = {}  # of a config on a mesh: tests that ask for the same share them


def start(config, devices=None):
    """A config's functions on its mesh: (step, state, train, evaluate, mesh)."""
    mesh = make_mesh(config.mesh, devices)
    name = fingerprint(config), mesh
    with jax.set_mesh(mesh):
        if name not in PROGRAMS:
            step = Step(config, VOCABULARY, np.ones(VOCABULARY, np.int32))
            cut = shardings(jax.eval_shape(step.init, jax.random.key(0)), mesh)
            rows = NamedSharding(mesh, PartitionSpec(BATCH))
            whole = NamedSharding(mesh, PartitionSpec())
            PROGRAMS[name] = step, *compiled(step, cut, rows, whole)
        step, init, train, evaluate = PROGRAMS[name]
        return step, init(jax.random.key(0)), train, evaluate, mesh


def losses(config, steps, devices=None):
    """The loss of each of the first steps."""
    _, state, train, _, mesh = start(config, devices)
    found = []
    with jax.set_mesh(mesh):
        for index in range(steps):
            state, metrics = train(state, batch(index % 4))
            found.append(float(metrics["loss"]))
    return found, state


def interrupted(config, folder):
    """What a third step gives, of a state and of what its checkpoint restores."""
    _, state, train, _, mesh = start(config, one_device())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with jax.set_mesh(mesh):
        for index in range(2):
            state, _ = train(state, batch(index))
        checkpoints = Checkpoints(folder, keep=1, report=print)
        checkpoints.save(2, state, data={}, config={})
        checkpoints.wait()
        again = checkpoints.restore(abstract).state
        checkpoints.close()
        return [train(x, batch(2)) for x in (state, again)]


def one_device():
    return jax.devices()[:1]
