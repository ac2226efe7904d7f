"""Equal layers as one scan: compiled once, however deep the model is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.masked import Blocked, FanIn
from sparsejax.memory import MemoryPlusConfig
from sparsejax.memory.table import Table, is_table, join, part
from sparsejax.nn.blocks import Block
from sparsejax.nn.config import ModelConfig, Run
from sparsejax.partition import ACTIVATIONS, constrain
from sparsejax.typing import Array, Float, PyTree

policies = jax.checkpoint_policies
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": policies.nothing_saveable,
    "dots": policies.dots_with_no_batch_dims_saveable,
    "names": policies.save_only_these_names("attended", "routed", "looked_up"),
}


def remat(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Apply the policy ``name`` to the body of a scan; ``none`` keeps everything."""
    if name not in POLICIES:
        return body
    # The scan keeps XLA from merging the two passes, so no barrier is needed. Twice,
    # because differentiating opens the outer one, and a scan moves the constants of an
    # open body, hundreds of them under a mesh, out of its loop. Nothing is done twice.
    for _ in range(2):
        body = jax.checkpoint(body, policy=POLICIES[name], prevent_cse=False)
    return body


def _stacked(spec: Any, config: ModelConfig, keys: Array) -> Block:
    """A block whose every parameter has a leading axis ``l``, one slice per key."""

    def build(key: Array) -> Block:
        return Block(spec, config, rngs=nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(lambda: build(keys[0])))
    state = jax.vmap(lambda key: nnx.state(build(key)))(keys)
    lift = lambda x: x.replace(x.get_value(), axes=f"l {x.axes}".strip())  # noqa: E731
    state = jax.tree.map(lift, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(graph, state)


def _gathered(state: PyTree) -> PyTree:
    """One layer's parameters, whole along ``fsdp``: gathered here, freed after use.

    Tables that are read by rows stay where they are: ids travel. What multiplies in
    a way of its own gathers itself.
    """

    def gather(x: nnx.Variable) -> nnx.Variable:
        if is_table(x) or isinstance(x.get_value(), Blocked | FanIn):
            return x
        axes = x.axes.removeprefix("l").strip()
        rules = ACTIVATIONS if len(axes.split()) > 1 else {}
        return x.replace(constrain(x.get_value(), axes, rules))

    return jax.tree.map(gather, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


class Stack(nnx.Module):
    """``repeats`` copies of a period of blocks, run one after the other."""

    def __init__(self, run: Run, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.remat, self.repeats = config.remat, run.repeats
        layers = (spec.feed_forward for spec in run.period)
        self.readers = tuple(isinstance(x, MemoryPlusConfig) for x in layers)
        keys = jax.random.split(rngs.params(), (len(run.period), run.repeats))
        self.blocks = nnx.List(
            _stacked(spec, config, key)
            for spec, key in zip(run.period, keys, strict=True)
        )

    def __call__(
        self, x: Float[Array, "b t d"], caches: PyTree, context: dict[str, Any]
    ) -> tuple[Float[Array, "b t d"], list[Any], PyTree]:
        """Return the value, each member's losses and metrics, and the filled caches.

        Losses and metrics have a leading axis over the repeats; the outputs' values are
        left out. Each layer has its own part of the random key, if there is one.
        """
        graphs, states = zip(*map(nnx.split, self.blocks), strict=True)
        states, held = part(states)
        key = context.get("key")
        shape = len(jax.tree.leaves(states[0])[0]), len(graphs)
        keys = None if key is None else jax.random.split(key, shape)

        def body(x: Array, layer: tuple[Any, ...]) -> tuple[Array, Any]:
            states, caches, keys, repeat = layer
            states = join(states, held)
            asides, filled = [], []
            for n, graph in enumerate(graphs):
                block = nnx.merge(graph, _gathered(states[n]))
                own = context | {"key": None if keys is None else keys[n]}
                own["pool"] = self._pool(context, repeat, n)
                output, longer = block(x, cache=caches[n], **own)
                x = output.value
                asides.append((output.losses, output.metrics))
                filled.append(longer)
            return x, (asides, filled)

        repeats = jnp.arange(shape[0])
        x, (asides, filled) = jax.lax.scan(
            remat(body, self.remat), x, (states, caches, keys, repeats)
        )
        return x, asides, filled

    def _pool(self, context: dict[str, Any], repeat: Array, block: int) -> Any:
        """The shared values, as one of their readers is to see them."""
        pool = context["pool"]
        if not isinstance(pool, Table):
            return pool
        own = repeat * sum(self.readers) + sum(self.readers[:block])
        return pool.read_by(context["reader"] + own)
