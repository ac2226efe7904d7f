"""Experts of a single neuron: a lookup picks them, a bag adds them up."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.memory.bag import embedding_bag, row_products
from sparsejax.memory.config import PEERConfig
from sparsejax.memory.layer import ProductKeys, batch_moments, merge_heads, normal
from sparsejax.memory.table import Table
from sparsejax.memory.usage import usage
from sparsejax.typing import Array, Bool, Float, Int, Output, PRNGKeyArray

__all__ = ["ACTIVATIONS", "PEER", "SCORES", "single_neurons"]

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
SCORES = {
    "softmax": jax.nn.softmax,  # experts of one head compete
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
}


def single_neurons(
    x: Float[Array, "n d"],
    down: Float[Array, "m d"] | Table,
    up: Float[Array, "m d"] | Table,
    ids: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    *,
    activation: str = "gelu",
) -> Float[Array, "n d"]:
    """Run the named experts: ``sum_k w_k act(down_k . x) up_k``, added in float32.

    Source: He 2024, arXiv:2407.04153, Sec. 2.
    """
    hidden = row_products(down, ids, x.astype(jnp.float32))
    hidden = ACTIVATIONS[activation](hidden) * weights
    return embedding_bag(up, ids, hidden).astype(x.dtype)


class PEER(nnx.Module):
    """Retrieve experts of one neuron by product keys and add their outputs.

    Source: He 2024, arXiv:2407.04153, Sec. 2. Departure: queries are normalised over
    their own channels by default, over the batch with ``query_norm="batch"``.
    """

    def __init__(
        self,
        config: PEERConfig,
        width: int,
        *,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.lookup = ProductKeys(config, width, rngs=rngs)
        shape, active = (config.slots, width), config.heads * config.per_head
        down = normal(rngs.params(), shape, width**-0.5)
        self.down = nnx.Param(down, axes="m d", reads=config.reads)
        up = normal(rngs.params(), shape, init_scale * active**-0.5)
        self.up = nnx.Param(up, axes="m d", reads=config.reads)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Run the experts of every token.

        Args:
            x: hidden states.
            valid: False for padding.
            key: random key in training, None otherwise; it says which is the case.
        """
        rows, act = x.reshape(-1, x.shape[-1]), self.config.activation
        moments, seen = batch_moments(self.lookup, rows, valid, key)
        ids, weights = self.choose(rows, moments)
        value = single_neurons(
            rows,
            self.down[...],
            self.up[...],
            *merge_heads(ids, weights),
            activation=act,
        )
        metrics = usage(ids, weights, slots=self.config.slots, valid=valid)
        return Output(value.reshape(x.shape), {}, metrics | seen)

    def choose(
        self,
        rows: Float[Array, "n d"],
        moments: Float[Array, "2 h c"] | None = None,
    ) -> tuple[Int[Array, "n h k"], Float[Array, "n h k"]]:
        """Give the experts that each head runs, and their weights.

        Args:
            rows: hidden states.
            moments: of the batch that queries are normed over, in training.
        """
        config = self.config
        hits = self.lookup(
            rows, k=config.per_head, norm=config.query_norm, moments=moments
        )
        return hits.ids, SCORES[config.scores](hits.scores)
