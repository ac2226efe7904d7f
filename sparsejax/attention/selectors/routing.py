"""Routing Transformer: queries read the keys that online k-means puts in their cluster.

The centroids are state, not parameters: no gradient reaches them. In training the mixer
reports ``metrics["sums"]`` and ``metrics["members"]`` of what each stands for; whoever
owns the step writes ``moved(centroids, sums, members, decay)`` after it. A key head
whose centroids are all zero has one cluster and so reads the latest keys: a window.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.attention.context import Context, Mixed, Place
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.selectors.plain import Mixer, Sizes, Work
from sparsejax.config import require
from sparsejax.typing import Array, Float, Int

__all__ = ["Centroids", "Routing", "RoutingOptions", "moved", "routing", "unit"]


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Clusters of every key head, and how fast their centroids move."""

    clusters: int = 16
    top: int = 256  # keys of a query, its own included
    local: int = 0  # leading key heads with one cluster: a window of ``top``
    decay: float = 0.999  # of a centroid, in one step
    commitment: float = 1e-4  # weight of the loss that draws vectors to centroids

    def __post_init__(self) -> None:
        for name in ("clusters", "top"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be >= 1")
        for name in ("local", "commitment"):
            value = getattr(self, name)
            require(value >= 0, name, value, "must not be negative")
        inside = 0 <= self.decay <= 1
        require(inside, "decay", self.decay, "must be between 0 and 1")

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count pairs as if clusters were equally large, and products with centroids.

        With heads of both kinds, the mean over heads.
        """
        del block_kv
        seen, share = np.arange(tokens), self.local / sizes.kv_heads
        window, cluster = (
            (np.minimum(seen // n, self.top - 1) + 1).sum() for n in (1, self.clusters)
        )
        vectors = tokens * (sizes.heads + sizes.kv_heads)
        choosing = 2.0 * vectors * self.clusters * sizes.head_width
        return Work(float(share * window + (1 - share) * cluster), choosing)


class Centroids(nnx.Variable):
    """Directions of a layer's clusters, of norm 1; or 0 in heads with one cluster."""


def unit(x: Float[Array, "*shape c"]) -> Float[Array, "*shape c"]:
    """Scale to norm 1, in float32; zero stays zero."""
    x = x.astype("float32")
    square = (x * x).sum(axis=-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def nearest(
    x: Float[Array, "b t h c"], centroids: Float[Array, "g m c"]
) -> Int[Array, "b t h"]:
    """Cluster of every vector: the centroid with the largest product."""
    heads = x.shape[2] // centroids.shape[0]
    each = jax.lax.stop_gradient(centroids).repeat(heads, axis=0)
    scores = jnp.einsum("bthc,hmc->bthm", x.astype("float32"), each)
    return scores.argmax(axis=-1).astype("int32")


def routing(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    *,
    centroids: Float[Array, "g m c"],
    top: int,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose for every query itself and the latest keys of its cluster.

    Raises:
        ValueError: if ``top`` exceeds the number of keys.

    Source: Roy et al. 2020, arXiv:2003.05997, Sec. 4.1. Departure: of a cluster with
    too many keys the latest are read, not those nearest to the centroid, among which
    later tokens would decide; a query reads its own key, whatever the cluster of that.
    """
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    clusters, top = centroids.shape[1], place.budget("top", top, s, "keys")
    ours, theirs = nearest(q, centroids), nearest(k, centroids)
    hits = jax.nn.one_hot(theirs, clusters, axis=1, dtype="int32")  # [b, m, s, g]
    before = jnp.pad(hits.cumsum(axis=2), [(0, 0), (0, 0), (1, 0), (0, 0)])
    order = jnp.argsort(theirs, axis=1, stable=True)  # by cluster, then by position
    first = jnp.cumsum(before[:, :, -1], axis=1) - before[:, :, -1]  # in that order
    i = place.positions(t)[None, :, None]
    i = jnp.minimum(jnp.broadcast_to(i, (b, t, h)), s - 1)
    head = (jnp.arange(h, dtype="int32") // (h // g))[None, None]
    batch = jnp.arange(b, dtype="int32")[:, None, None]
    begin = jnp.take_along_axis(_begins(place, b, s), i[..., 0], axis=1)[..., None]
    # Those before the query itself, in its document; its own key is the first entry.
    until = before[batch, ours, i, head]
    there = until - before[batch, ours, jnp.minimum(begin, i), head]
    step = jnp.arange(top - 1, dtype="int32")[None, None, None]
    at = (first[batch, ours, head] + until - 1)[..., None] - step
    earlier = order[batch[..., None], jnp.maximum(at, 0), head[..., None]]
    ids = jnp.concatenate([i[..., None], earlier.astype("int32")], axis=-1)
    return BlockMask.from_blocks(
        ids.swapaxes(1, 2),
        (1 + jnp.minimum(there, top - 1)).mT,
        q_len=t,
        kv_len=s,
        block_q=1,
        block_kv=1,
        q_offset=place.q_offset,
    )


def _begins(place: Place, batch: int, kv_len: int) -> Int[Array, "b s"]:
    """Position of the first token of every key's document."""
    if place.segments is None:
        return jnp.zeros((batch, kv_len), "int32")
    numbers = place.segments.kv
    fresh = numbers[:, 1:] != numbers[:, :-1]
    at = jnp.where(fresh, jnp.arange(1, kv_len, dtype="int32")[None], 0)
    return jax.lax.cummax(jnp.pad(at, [(0, 0), (1, 0)]), axis=1)


def moved(
    centroids: Float[Array, "*l g m c"],
    sums: Float[Array, "*l g m c"],
    members: Float[Array, "*l g m"],
    decay: float,
) -> Float[Array, "*l g m c"]:
    """Move centroids towards the mean of their members; those without any stay.

    Source: Roy et al. 2020, arXiv:2003.05997, Alg. 1. Departure: towards the mean, not
    the sum, and back to norm 1, so that the size of a batch does not count.
    """
    mean = sums / jnp.maximum(members, 1)[..., None]
    there = (members > 0)[..., None] & (centroids != 0).any(axis=-1, keepdims=True)
    towards = unit(decay * centroids + (1 - decay) * mean)
    return jnp.where(there, towards.astype(centroids.dtype), centroids)


class Routing(Mixer):
    """Attention within clusters; in heads with a single one, within a window.

    Source: Roy et al. 2020, arXiv:2003.05997, Alg. 1. Departure: queries and keys are
    projections of their own and clustered as rotated; their norm is 1 for clustering
    alone; the commitment loss is that of a later implementation.
    """

    def __init__(self, config: Any, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        self.options = options = config.options
        _, _, g, c = sizes
        if options.local > g:
            raise ValueError(
                f"selection.local={options.local}: there are only {g} key heads"
            )
        draw = unit(jax.random.normal(rngs.params(), (g, options.clusters, c)))
        routed = jnp.arange(g)[:, None, None] >= options.local
        init = jnp.where(routed, draw, 0)
        self.centroids = Centroids(init, axes=f"g {options.clusters} c")

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g c"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend within clusters; losses: ``commitment``."""
        del x
        centroids = jax.lax.stop_gradient(self.centroids[...])

        def select(q: Array, k: Array, centroids: Array, *, place: Place) -> BlockMask:
            top = self.options.top
            return routing(q, k, centroids=centroids, top=top, place=place)

        mixed = context.attend(q, k, v, select, centroids, axes=("g m c",))
        if context.cached:
            return mixed
        sums, members, loss = _statistics(q, k, centroids, context)
        said = {"sums": sums, "members": members}
        losses = {"commitment": self.options.commitment * loss}
        return mixed._replace(losses=losses, metrics=mixed.metrics | said)


def _statistics(
    q: Array, k: Array, centroids: Array, context: Context
) -> tuple[Float[Array, "g m c"], Float[Array, "g m"], Float[Array, ""]]:
    """Sums and numbers of each cluster's vectors; their mean square distance to it."""
    (b, t, g, c), clusters = k.shape, centroids.shape[1]
    own = q.reshape(b, t, g, -1, c)
    x = unit(jnp.concatenate([own, k[:, :, :, None]], axis=3))  # "b t g r c"
    chosen = nearest(x.reshape(b, t, -1, c), centroids).reshape(x.shape[:-1])
    hits = jax.nn.one_hot(chosen, clusters)
    if context.segments is not None:
        real = (context.segments.kv != 0).astype("float32")
        hits = hits * real[:, :, None, None, None]
    sums = jnp.einsum("btgrm,btgrc->gmc", hits, x)
    members = hits.sum(axis=(0, 1, 3))
    near = (sums * centroids).sum(axis=-1)  # cosines
    routed = (centroids != 0).any(axis=-1)
    far = 2 * jnp.where(routed, members - near, 0).sum()
    loss = far / jnp.maximum(c * jnp.where(routed, members, 0).sum(), 1)
    return *jax.lax.stop_gradient((sums, members)), loss
