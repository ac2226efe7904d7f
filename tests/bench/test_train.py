import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.bench import bare
from sparsejax.bench import table as results
from sparsejax.bench import train as bench
from sparsejax.config import convert, read
from sparsejax.data import Batch
from sparsejax.train.config import Config
from sparsejax.train.metrics import read_metrics
from sparsejax.train.step import Step

VOCABULARY = 258
ROWS, LENGTH = 4, 64


@pytest.fixture(autouse=True)
def a_user_s_world():
    """The bare loop is a user's own, who knows nothing of our strictness."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def dense(**data):
    """The dense config with rows of another shape, or other text."""
    values = read(results.ROOT / "configs" / "dense.py")
    values["data"] |= {"seq_len": LENGTH, "batch_size": ROWS, **data}
    values["train"] |= {"log_every": 2}
    return convert(Config, values)


def packed(seed):
    """Documents that end at places of the row's own, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    ends = np.sort(rng.integers(8, LENGTH - 4, (ROWS, 3)), axis=1)[:, :, None]
    at = np.arange(LENGTH + 1)[None]
    segments = 1 + (at[None] >= ends.swapaxes(0, 1)).sum(axis=0)
    starts = np.where(at[None] >= ends.swapaxes(0, 1), ends.swapaxes(0, 1), 0)
    positions = at - starts.max(axis=0)
    segments = np.where(segments == 4, 0, segments)
    return Batch(*(x.astype(np.int32) for x in (tokens, segments, positions)))


def losses_of_both(config, steps):
    """Our step and the bare one from the same parameters on the same batches."""
    ours = Step(config, VOCABULARY, np.ones(VOCABULARY, np.int32))
    state = jax.jit(ours.init)(jax.random.key(1))
    parameters = bench.bare_parameters(state.params, VOCABULARY)
    optimizer = bare.make_optimizer(config.train.steps)
    opt, step = optimizer.init(parameters), bare.make_step(optimizer, LENGTH)
    train, found = jax.jit(ours.train), []
    for index in range(steps):
        batch = jax.tree.map(jnp.asarray, packed(index % 2))
        state, metrics = train(state, batch)
        parameters, opt, loss = step(parameters, opt, batch)
        found.append((float(metrics["loss"]), float(loss)))
    return np.array(found).T


def test_the_bare_step_is_our_step():
    # Steps 1 and 2 of a pair share a batch, so a wrong update shows at once; the first
    # rates are a thirtieth of the peak and rise.
    ours, same = losses_of_both(dense(), 8)
    np.testing.assert_allclose(same, ours, rtol=1e-5)
    assert ours[-1] < ours[0] - 0.2
