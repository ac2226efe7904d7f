"""A model made ready to read a few tokens at a time: its layers one by one.

A scan over stacked layers cuts every layer's weights and caches out of the stack, and
puts the caches back. That is nothing beside a thousand tokens and more than all the
rest beside one. Here each layer has arrays of its own and is called by itself; equal
layers share one compiled program, and a cache is overwritten in place.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.attention import Cache
from sparsejax.nn.blocks import Block
from sparsejax.nn.transformer import Transformer, before
from sparsejax.typing import Array, Float, Int, PyTree

__all__ = ["Decoder", "Whole", "layers"]


class Decoder:
    """A Transformer's layers, one by one. Nothing in it is trained."""

    def __init__(self, model: Transformer) -> None:
        """Take a model apart; on a CPU the layers' arrays are views of the stacks'."""
        self.config = model.config
        shell = nnx.merge(*nnx.split(model))
        shell.stacks = nnx.List([])
        self.shell = shell
        self.model, self.layers = model, [*layers(model, _cut)]

    def empty_caches(self, batch: int, capacity: int) -> list[Cache]:
        """Give caches for ``capacity`` tokens, for every layer in its order."""
        stacks = self.model.empty_caches(batch, capacity)
        return [
            jax.tree.map(lambda x, n=n: x[n], cache)
            for stack, members in zip(self.model.stacks, stacks, strict=True)
            for n in range(stack.repeats)
            for cache in members
        ]

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        caches: list[Cache],
        *,
        previous: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b v"], list[Cache]]:
        """Read tokens; score what follows the last, and give the longer caches.

        Args:
            tokens: token ids, after those in the caches.
            caches: are gone after the call.
            previous: the id before each row's first, where there is one.
        """
        x, context = _run(_enter, self.shell, tokens, caches[0].length, previous)
        filled = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, longer = _run(_layer, layer, x, context, spent=cache)
            filled.append(longer)
        return _run(_leave, self.shell, x), filled


class Whole:
    """The same as one program, which an accelerator wants: it is called seldom."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def empty_caches(self, batch: int, capacity: int) -> PyTree:
        """Give caches for ``capacity`` tokens."""
        return self.model.empty_caches(batch, capacity)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        caches: PyTree,
        *,
        previous: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b v"], PyTree]:
        """Read tokens, as a ``Decoder`` does."""
        return _whole(self.model, tokens, previous, caches)


@functools.partial(jax.jit, donate_argnames="caches")
def _whole(
    model: Transformer, tokens: Array, previous: Array | None, caches: PyTree
) -> tuple[Array, PyTree]:
    hidden = model(tokens, previous=previous, caches=caches)
    return model.logits(hidden.value[:, -1:])[:, 0], hidden.caches


def layers(
    model: Transformer, cut: Callable[[Array, int], Array] = operator.getitem
) -> Iterator[Block]:
    """Give a model's layers one by one, in order, out of the stacks they lie in.

    Args:
        cut: takes one layer's array out of a stack of them.
    """
    for stack in model.stacks:
        members = [nnx.split(block) for block in stack.blocks]
        for n in range(stack.repeats):
            for graph, state in members:
                yield nnx.merge(graph, jax.tree.map(lambda x, n=n: cut(x, n), state))


def _cut(stack: Array, layer: int) -> Array:
    """One layer's array: where it lies, if it lies in the memory of this process."""
    device, *others = stack.devices()
    if others or device.platform != "cpu":
        return stack[layer]
    return jax.device_put(np.asarray(stack)[layer], device, may_alias=True)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="spent")
def _run(
    function: Callable[..., Any], module: nnx.Module, *rest: Any, spent: Any = None
) -> Any:
    """Call ``function(module, *rest)``, compiled once for all equal modules.

    Args:
        spent: a last argument, whose memory becomes that of the result.
    """
    given = () if spent is None else (spent,)
    return function(module, *rest, *given)


def _enter(
    shell: Transformer, tokens: Array, start: Array, previous: Array | None
) -> tuple[Array, dict[str, Any]]:
    count = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(count, tokens.shape)
    context = {"tokens": tokens, "positions": positions, "segments": None}
    context["previous"] = before(tokens, positions, previous)
    context["pool"] = shell.pool.values[...] if hasattr(shell, "pool") else None
    return shell.embed(tokens), context


def _layer(
    block: Block, x: Array, context: dict[str, Any], cache: Cache
) -> tuple[Array, Cache]:
    output, longer = block(x, cache=cache, **context, key=None, reader=0)
    assert longer is not None  # as there was one
    return output.value, longer


def _leave(shell: Transformer, x: Array) -> Array:
    return shell.logits(shell.norm(x[:, -1:]))[:, 0]
