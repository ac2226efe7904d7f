"""Trees: every node is a yes-or-no question to the token, every leaf a small layer.

Node 0 is the root; the children of node ``i`` are ``2 i + 1`` (no) and ``2 i + 2``
(yes); a logit of zero is a yes. Leaf ``e`` owns neurons ``e * w ... e * w + w - 1``,
rows of two tables. The soft path mixes all leaves by the probability of reaching them,
the hard path visits one; both have the signature ``(x, tree, *, activation) -> Answer``
and agree where every decision is certain. Decisions are float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.memory.bag import embedding_bag, row_products
from sparsejax.memory.config import FastFeedForwardConfig
from sparsejax.memory.layer import normal
from sparsejax.memory.peer import ACTIVATIONS
from sparsejax.memory.table import Table
from sparsejax.memory.usage import entropy, mean_of_valid, usage
from sparsejax.typing import Array, Bool, Float, Int, Output, PRNGKeyArray

__all__ = ["PATHS", "Answer", "FastFeedForward", "Tree", "hard", "leaf_weights", "soft"]


class Tree(NamedTuple):
    """The parameters of all nodes and of all leaves, one after the other."""

    node: Float[Array, "nodes d"]
    node_bias: Float[Array, " nodes"]
    down: Float[Array, "m d"] | Table
    down_bias: Float[Array, " m"]
    up: Float[Array, "m d"] | Table
    up_bias: Float[Array, "e d"]


class Answer(NamedTuple):
    """What a tree says to every token, and how sure it is."""

    value: Float[Array, "n d"]
    leaf: Int[Array, " n"]  # where the hard path ends
    leaf_entropy: Float[Array, " n"]  # of the weights of the leaves, in nats
    node_entropy: Float[Array, " n"]  # of every decision, added up, in nats


def leaf_weights(logits: Float[Array, "n nodes"]) -> Float[Array, "n e"]:
    """Multiply the probabilities of the decisions on the way to each leaf."""
    tokens, nodes = logits.shape
    weights = jnp.ones((tokens, 1), logits.dtype)
    while (leaves := weights.shape[1]) <= nodes:
        level = logits[:, leaves - 1 : 2 * leaves - 1]
        no, yes = jax.nn.sigmoid(-level), jax.nn.sigmoid(level)
        weights = jnp.stack([weights * no, weights * yes], -1)
        weights = weights.reshape(tokens, 2 * leaves)
    return weights


def soft(x: Float[Array, "n d"], tree: Tree, *, activation: str = "relu") -> Answer:
    """Mix the answers of all leaves: one wide layer whose neurons are weighted.

    Source: Belcak & Wattenhofer 2023, arXiv:2308.14711, Alg. 1.
    """
    logits = x.astype(jnp.float32) @ tree.node.T + tree.node_bias[None]
    weights = leaf_weights(logits)
    mix = weights.astype(x.dtype)
    leaves: Any = tree[2:]
    down, down_bias, up, up_bias = (w.astype(x.dtype) for w in leaves)
    hidden = ACTIVATIONS[activation](x @ down.T + down_bias[None])
    hidden *= jnp.repeat(mix, down.shape[0] // mix.shape[1], axis=1)

    def ask(node: Array) -> Array:
        return jnp.take_along_axis(logits, node[:, None], 1)[:, 0]

    return Answer(
        value=hidden @ up + mix @ up_bias,
        leaf=_descend(ask, tree, x.shape[0]),
        leaf_entropy=entropy(weights),
        node_entropy=_entropy_of_decisions(logits),
    )


def hard(x: Float[Array, "n d"], tree: Tree, *, activation: str = "relu") -> Answer:
    """Ask the nodes on the way down to one leaf and run it; read nothing else.

    Source: Belcak & Wattenhofer 2023, arXiv:2308.14711, Alg. 1. Departure: the output
    bias is kept, which the released code drops.
    """
    wide = x.astype(jnp.float32)

    def ask(node: Array) -> Array:
        return row_products(tree.node, node[:, None], wide)[:, 0] + tree.node_bias[node]

    leaf = _descend(ask, tree, x.shape[0])
    width = tree.down.shape[0] // tree.up_bias.shape[0]
    ids = leaf[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None]
    hidden = row_products(tree.down, ids, wide) + tree.down_bias[ids]
    y = embedding_bag(tree.up, ids, ACTIVATIONS[activation](hidden))
    zeros = jnp.zeros(x.shape[0], jnp.float32)
    return Answer((y + tree.up_bias[leaf]).astype(x.dtype), leaf, zeros, zeros)


PATHS = {"soft": soft, "hard": hard}


def _descend(ask: Callable[[Array], Array], tree: Tree, tokens: int) -> Array:
    """Follow every token's answers down to the number of its leaf."""
    nodes = tree.node.shape[0]
    node = jnp.zeros(tokens, jnp.int32)
    for _ in range(nodes.bit_length()):
        node = 2 * node + 1 + (ask(node) >= 0).astype(jnp.int32)
    return node - nodes


def _entropy_of_decisions(logits: Float[Array, "n nodes"]) -> Float[Array, " n"]:
    def surprise(x: Array) -> Array:
        return -jax.nn.sigmoid(x) * jax.nn.log_sigmoid(x)

    return (surprise(logits) + surprise(-logits)).sum(-1)


class FastFeedForward(nnx.Module):
    """A tree to train by its soft path and to infer by its hard one.

    The loss ``hardening`` pushes decisions to yes or no, so that the paths agree; on
    the hard path it is zero, and no node has a gradient.

    Source: Belcak & Wattenhofer 2023, arXiv:2308.14711, Sec. 3.
    """

    def __init__(
        self,
        config: FastFeedForwardConfig,
        width: int,
        *,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.config = config
        nodes, shape = config.leaves - 1, (config.slots, width)
        node = normal(rngs.params(), (nodes, width), width**-0.5)
        self.node = nnx.Param(node, axes="1 d")
        self.node_bias = nnx.Param(jnp.zeros(nodes, jnp.float32), axes="1")
        # The soft path multiplies with all rows.
        about: dict[str, Any] = {"reads": config.reads} if config.reads else {}
        down = normal(rngs.params(), shape, width**-0.5)
        self.down = nnx.Param(down, axes="m d", **about)
        self.down_bias = nnx.Param(jnp.zeros(config.slots, jnp.float32), axes="m")
        up = normal(rngs.params(), shape, init_scale * config.leaf_width**-0.5)
        self.up = nnx.Param(up, axes="m d", **about)
        bias = jnp.zeros((config.leaves, width), jnp.float32)
        self.up_bias = nnx.Param(bias, axes="1 d")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Answer every token by the path that the config names.

        Args:
            x: hidden states.
            valid: False for padding.
            key: random key in training, None otherwise; it says which is the case.
        """
        config, rows = self.config, x.reshape(-1, x.shape[-1])
        path = config.path if key is not None else config.inference or config.path
        params = self.node, self.node_bias, self.down, self.down_bias
        tree = Tree(*(p[...] for p in (*params, self.up, self.up_bias)))
        answer = PATHS[path](rows, tree, activation=config.activation)
        once = jnp.ones((rows.shape[0], 1, 1), jnp.float32)
        ids = answer.leaf[:, None, None]
        metrics = usage(ids, once, slots=config.leaves, valid=valid)
        metrics["entropy"] = jax.lax.stop_gradient(
            mean_of_valid(answer.leaf_entropy, valid)
        )
        undecided = mean_of_valid(answer.node_entropy, valid)
        losses = {"hardening": config.hardening * undecided}
        return Output(answer.value.reshape(x.shape), losses, metrics)
