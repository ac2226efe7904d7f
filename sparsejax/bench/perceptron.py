"""A small perceptron under any plan of masks, trained whole in one compiled call.

Two tasks. ``digits``: handwritten digits, 8 x 8 pixels, of which each seed holds out
another third. ``bytes``: which byte follows sixteen others in English text, of which
every twentieth document is held out; few windows are seen twice.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.config import choose, require
from sparsejax.data.corpora import CORPORA, group_hash, held_out
from sparsejax.masked import MaskedConfig, effective, masks_of, sparse
from sparsejax.typing import Array, Float, Int, PRNGKeyArray, PyTree

__all__ = ["TASKS", "Data", "Run", "Trained", "Trainer", "trainer", "weights"]

WINDOW = 16  # bytes that the next one is told from
EMBEDDED = 16  # width of a byte's embedding
EVERY = 20  # one document in so many is held out
WINDOWS = 400_000, 20_000  # of training and held-out text


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run is, but for its seed."""

    task: str
    hidden: int  # width of both hidden layers
    steps: int
    learning_rate: float  # at first; it falls to 0 along a cosine
    batch_size: int = 64
    masked: MaskedConfig | None = None

    def __post_init__(self) -> None:
        choose("task", self.task, TASKS)
        for name in ("hidden", "steps", "learning_rate", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "is not > 0")


class Data(NamedTuple):
    """Examples and their labels, to train on and held out."""

    inputs: Array
    labels: Int[Array, " n"]
    held_inputs: Array
    held_labels: Int[Array, " _"]


class Trained(NamedTuple):
    """What came of a run."""

    loss: Float[Array, ""]  # held out, nats
    accuracy: Float[Array, ""]  # held out
    nonzero: Float[Array, ""]  # weights at the end, without biases and embedding
    average: Float[Array, ""]  # the same, averaged over the steps


def digits(seed: int) -> Data:
    """Read the digits of scikit-learn; they come inside its package."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  # of studies only

    found: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.data))
    held, rest = np.split(order, [len(order) // 3])
    images, labels = (found.data / 16).astype("float32"), found.target.astype("int32")
    parts = images[rest], labels[rest], images[held], labels[held]
    return Data(*map(jnp.asarray, parts))


def english_bytes(seed: int) -> Data:
    """Cut windows of bytes out of English text."""
    random, parts = np.random.default_rng(seed), []
    for text, count in zip(_texts(), WINDOWS, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(text, WINDOW + 1)
        chosen = windows[random.permutation(len(windows))[:count]]
        parts += [chosen[:, :-1], chosen[:, -1].astype("int32")]
    return Data(*map(jnp.asarray, parts))


@functools.cache
def _texts() -> tuple[np.ndarray, np.ndarray]:
    corpus = CORPORA["english"](EVERY)
    held, texts = held_out(corpus), ([], [])
    for document in corpus.documents():
        texts[group_hash(document.group) in held].append(document.text.encode())
    shown, hidden = (np.frombuffer(b"".join(x), np.uint8) for x in texts)
    return shown, hidden


class Task(NamedTuple):
    """How to get its data, and the sizes of both ends of a network for it."""

    data: Callable[[int], Data]
    inputs: int
    outputs: int
    vocabulary: int  # of what is embedded, or 0


TASKS = {
    "digits": Task(digits, 64, 10, 0),
    "bytes": Task(english_bytes, WINDOW * EMBEDDED, 256, 256),
}


def weights(task: str, hidden: int) -> int:
    """Count the weights that may be masked."""
    return hidden * (TASKS[task].inputs + hidden + TASKS[task].outputs)


Trainer = Callable[[PRNGKeyArray, Data], Trained]


def trainer(run: Run) -> Trainer:
    """Compile a whole run; the key and the data decide the rest."""
    rate = optax.cosine_decay_schedule(run.learning_rate, run.steps)
    tx, plan = optax.adam(rate), run.masked
    tx = tx if plan is None else sparse(tx, plan)

    def used(params: PyTree, opt: PyTree, training: bool) -> PyTree:
        return effective(params, opt, plan, training=training) if plan else params

    def body(carry: Any, key: PRNGKeyArray, data: Data) -> Any:
        params, opt, total = carry
        at = jax.random.randint(key, (run.batch_size,), 0, len(data.labels))
        x, y = data.inputs[at], data.labels[at]
        objective = lambda p: jnp.mean(_losses(used(p, opt, True), x, y)[0])  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
            updates, opt = tx.update(jax.grad(objective)(params), opt, params)
        params = optax.apply_updates(params, updates)
        return (params, opt, total + _live(params, opt, plan) / run.steps), None

    def train(key: PRNGKeyArray, data: Data) -> Trained:
        first, rest = jax.random.split(key)
        params = _drawn(run, first)
        carry = (params, tx.init(params), jnp.zeros(()))
        steps = lambda c, n: body(c, jax.random.fold_in(rest, n), data)  # noqa: E731
        (params, opt, average), _ = jax.lax.scan(steps, carry, jnp.arange(run.steps))
        final = used(params, opt, False)
        losses, hits = _losses(final, data.held_inputs, data.held_labels)
        live = _live(params, opt, plan)
        return Trained(jnp.mean(losses), jnp.mean(hits), live, average)

    return jax.jit(train)


def _drawn(run: Run, key: PRNGKeyArray) -> dict[str, Array]:
    task, init = TASKS[run.task], jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 4)
    sides = task.inputs, run.hidden, run.hidden, task.outputs
    params = {}
    for n, name in enumerate(("first", "second", "third")):
        params[name] = init(keys[n], sides[n : n + 2])
        params[f"{name}_bias"] = jnp.zeros(sides[n + 1])
    if task.vocabulary:
        table = jax.random.normal(keys[3], (task.vocabulary, EMBEDDED))
        params["embedding"] = table
    return params


def _losses(params: PyTree, x: Array, y: Array) -> tuple[Array, Array]:
    """Give each example's loss, and whether the first choice is right."""
    if "embedding" in params:
        x = params["embedding"][x.astype("int32")].reshape(len(x), -1)
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name] + params[f"{name}_bias"][None])
    logits = x @ params["third"] + params["third_bias"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses, (jnp.argmax(logits, axis=1) == y).astype(jnp.float32)


def _live(params: PyTree, opt: PyTree, plan: MaskedConfig | None) -> Array:
    total = sum(math.prod(x.shape) for x in params.values() if x.ndim == 2)
    if "embedding" in params:
        total -= params["embedding"].size
    if plan is None:
        return jnp.float32(total)
    masks = [mask[...] for mask in masks_of(opt).values()]
    dead = sum(jnp.sum(~mask, dtype=jnp.float32) for mask in masks)
    return jnp.float32(total) - dead
