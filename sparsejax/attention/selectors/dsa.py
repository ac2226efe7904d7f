"""DeepSeek sparse attention: a small indexer chooses single keys, and learns to.

The indexer sees the layer's input without passing a gradient to it, and learns only
from its own loss; the choice passes no gradient either. So the model never learns from
the indexer's loss, nor the indexer from the model's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.attention.context import Context, Mixed, Place, listed
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.patterns import causal
from sparsejax.attention.rope import rope
from sparsejax.attention.rows import Score
from sparsejax.attention.selection import best, in_chunks, visible_keys
from sparsejax.attention.selectors.plain import Mixer, Sizes, Work
from sparsejax.config import require
from sparsejax.typing import Array, Float, Int

__all__ = ["DSA", "DSAOptions", "dsa", "index"]

CHUNK = 2**22  # elements of keys or scores held at once


@dataclass(frozen=True, kw_only=True)
class DSAOptions:
    """Budget and sizes; ``warmup`` attends densely while the indexer learns."""

    top: int = 2048  # keys of a query
    heads: int = 64  # of the indexer
    width: int = 128  # of an indexer's head
    rotated: int = 64  # leading channels of it that see positions
    stage: Literal["sparse", "warmup"] = "sparse"
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("top", "heads", "width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be >= 1")
        fits = 0 <= self.rotated <= self.width and self.rotated % 2 == 0
        rule = f"must be even and at most width={self.width}"
        require(fits, "rotated", self.rotated, rule)
        weight = self.loss_weight
        require(weight >= 0, "loss_weight", weight, "must not be negative")

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count chosen pairs, and the indexer's product with every earlier key."""
        del block_kv, sizes
        seen = np.arange(1, tokens + 1)
        pairs = seen if self.stage == "warmup" else np.minimum(seen, self.top)
        choosing = 2 * self.heads * (self.width + 1) * seen.sum()
        return Work(float(pairs.sum()), float(choosing))


def index(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s c"],
    weights: Float[Array, "b t h"],
) -> Float[Array, "b t s"]:
    """Score every key for every query: the weighted sum of rectified products.

    Source: DeepSeek-AI 2025, arXiv:2512.02556, Eq. 1.
    """
    products = jnp.einsum("bthc,bsc->bths", q, k, preferred_element_type="float32")
    return jnp.einsum("bth,bths->bts", weights, nnx.relu(products))


def dsa(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s 1 c"],
    *,
    weights: Float[Array, "b t h"],
    top: int,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose the keys with the best scores of the indexer, for all heads alike.

    Args:
        q: the indexer's queries.
        k: the indexer's keys, one head for all.
        weights: of the indexer's heads.
        top: keys of a query.

    Raises:
        ValueError: if ``top`` exceeds the number of keys.

    Source: DeepSeek-AI 2025, arXiv:2512.02556, Eq. 1-2. Departure: neither the Hadamard
    rotation, which leaves the scores as they are, nor 8-bit numbers.
    """
    top = place.budget("top", top, k.shape[1], "keys")

    def pick(q: Array, weights: Array, i: Array, *numbers: Array) -> tuple:
        scores = index(q, k[:, :, 0], weights)
        allowed = visible_keys(i, k.shape[1], place, *numbers)
        ids, count = best(scores[:, None], allowed[:, None], top=top)
        return ids[:, 0], count[:, 0]

    size = CHUNK // (q.shape[0] * q.shape[2] * k.shape[1])
    ids, count = in_chunks(pick, size, q, weights, *place.rows(q))
    return tokens(ids, count, k.shape[1], place)


def tokens(
    ids: Int[Array, "b t k"], count: Int[Array, "b t"], kv_len: int, place: Place
) -> BlockMask:
    """Give a mask of single keys, for all heads alike."""
    return BlockMask.from_blocks(
        ids[:, None],
        count[:, None],
        q_len=ids.shape[1],
        kv_len=kv_len,
        block_q=1,
        block_kv=1,
        q_offset=place.q_offset,
    )


def divergence(
    logits: Float[Array, "b h t k"],
    lse: Float[Array, "b h t"],
    scores: Float[Array, "b t k"],
    live: Any,
    place: Place,
) -> Float[Array, "b t"]:
    """Kullback-Leibler divergence from attention, summed over heads, to the indexer.

    Args:
        logits: of attention, for the keys in question.
        lse: its log-denominators.
        scores: the indexer's.
        live: which keys count, "b t k".
        place: of the queries; it knows whether heads are cut over devices.

    Source: DeepSeek-AI 2025, arXiv:2512.02556, Eq. 3-4.
    """
    finite = jnp.isfinite(lse)[..., None] & live[:, None]
    mass = jnp.where(finite, jnp.exp(jnp.where(finite, logits - lse[..., None], 0)), 0)
    mass = place.over_heads(mass.sum(axis=1))
    total = mass.sum(axis=-1, keepdims=True)
    target = jax.lax.stop_gradient(mass / jnp.where(total > 0, total, 1))
    scores = jnp.where(live, scores, jnp.finfo("float32").min)
    found = jax.nn.log_softmax(scores, axis=-1)
    wanted = jnp.log(jnp.where(target > 0, target, 1))
    return jnp.where(target > 0, target * (wanted - found), 0).sum(axis=-1)


class DSA(Mixer):
    """Attention to the keys that ``select`` finds by an indexer's scores."""

    def __init__(
        self,
        select: Callable[..., BlockMask],
        config: Any,
        sizes: Sizes,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        options = config.options
        self.select, self.options, self.config = select, options, config
        d, n, c = sizes.width, options.heads, options.width
        normal = lambda *shape: jax.random.normal(rngs.params(), shape)  # noqa: E731
        self.query = nnx.Param(normal(d, n, c) * d**-0.5, axes=f"d {n} c")
        self.key = nnx.Param(normal(d, c) * d**-0.5, axes="d c")
        self.weight = nnx.Param(normal(d, n) * d**-0.5, axes=f"d {n}")
        self.norm_scale = nnx.Param(jnp.ones(c), axes="c")
        self.norm_bias = nnx.Param(jnp.zeros(c), axes="c")

    def features(
        self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]
    ) -> dict[str, Array]:
        """The indexer's keys: normed to mean 0 and variance 1, scaled and rotated."""
        x = jax.lax.stop_gradient(x)
        wide = jnp.einsum("btd,dc->btc", x, self.key[...].astype(x.dtype))
        wide = jax.nn.standardize(wide.astype("float32"), epsilon=1e-6)
        wide = wide * self.norm_scale[...][None, None] + self.norm_bias[...][None, None]
        k = self._rotated(wide.astype(x.dtype)[:, :, None], positions)
        return {"indexer_keys": k}

    def _rotated(self, x: Array, positions: Array) -> Array:
        cut, config = self.options.rotated, self.config
        turning = {"theta": config.rope_theta, "scaling": config.rope_scaling}
        turned = rope(x[..., :cut], positions, **turning)
        return jnp.concatenate([turned, x[..., cut:]], axis=-1)

    def queries(self, x: Array, positions: Array) -> tuple[Array, Array]:
        """The indexer's queries, and the weights of its heads."""
        x, options = jax.lax.stop_gradient(x), self.options
        q = jnp.einsum("btd,dhc->bthc", x, self.query[...].astype(x.dtype))
        weights = jnp.einsum("btd,dh->bth", x, self.weight[...].astype(x.dtype))
        scale = (options.heads * options.width) ** -0.5
        return self._rotated(q, positions), weights.astype("float32") * scale

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g _"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend to the chosen keys; losses: ``indexer``."""
        query, weights = self.queries(x, context.positions)
        key = context.features["indexer_keys"].astype(x.dtype)

        def local(place: Place, q: Array, *rest: Any) -> Any:
            k, v, query, key, weights, sinks = rest
            mask = self._mask(query, key, weights, place)
            found = context.attended(q, k, v, mask, place, sinks=sinks)
            if context.cached:
                return found.values, listed(mask, q), jnp.zeros(q.shape[:2])
            near = found._replace(lse=jax.lax.stop_gradient(found.lse))
            given = jax.lax.stop_gradient((q, k)), near.lse, (query, key, weights)
            return (
                found.values,
                listed(mask, q),
                self._loss(*given, mask, place, scale=context.scale),
            )

        keys = context.keys
        letters = "b t h c", keys, keys, "b t k c", "b s 1 c", "b t k"
        values, density, loss = context.local(
            local,
            *(q, k, v, query, key, weights, context.sinks),
            axes=(*letters, None if context.sinks is None else "h"),
            outputs=("b t h c", "b t h", "b t"),
        )
        losses = {"indexer": self.options.loss_weight * loss.mean()}
        metrics = {"density": density.mean(), "divergence": loss.mean()}
        return Mixed(values, {} if context.cached else losses, metrics)

    def _mask(self, q: Array, k: Array, weights: Array, place: Place) -> BlockMask:
        if self.options.stage == "sparse":
            return self.select(q, k, weights=weights, options=self.options, place=place)
        t, s, config = q.shape[1], k.shape[1], self.config
        sizes = {"block_q": min(config.block_q, t), "block_kv": min(config.block_kv, s)}
        sizes |= {"q_len": t, "kv_len": s, "q_offset": place.q_offset}
        return BlockMask.from_pattern(causal(), **sizes)

    def _loss(
        self,
        qk: Any,
        lse: Array,
        indexer: Any,
        mask: BlockMask,
        place: Place,
        *,
        scale: float | None,
    ) -> Float[Array, "b t"]:
        """Divergence for each query, over the chosen keys or over all."""
        (q, k), (query, key, weights) = qk, indexer
        b, _, h, c = q.shape
        score = Score(c**-0.5 if scale is None else scale, self.config.softcap)
        rows = jnp.arange(b)[:, None, None]

        def chosen(
            q: Array, lse: Array, query: Array, weights: Array, *of: Array
        ) -> Any:
            ids, count = of
            grouped = q.reshape(*q.shape[:2], k.shape[2], -1, c).astype("float32")
            logits = jnp.einsum(
                "btgrc,btkgc->bgrtk", grouped, k[rows, ids].astype("float32")
            )
            live = jnp.arange(ids.shape[-1])[None, None] < count[..., None]
            products = jnp.einsum("bthc,btkc->bthk", query, key[rows, ids][:, :, :, 0])
            scores = jnp.einsum("bth,bthk->btk", weights, nnx.relu(products))
            logits = score.logits(logits).reshape(b, h, *ids.shape[1:])
            return divergence(logits, lse.mT, scores, live, place)

        def every(
            q: Array, lse: Array, query: Array, weights: Array, *of: Array
        ) -> Any:
            grouped = q.reshape(*q.shape[:2], k.shape[2], -1, c).astype("float32")
            logits = jnp.einsum("btgrc,bkgc->bgrtk", grouped, k.astype("float32"))
            live = visible_keys(of[0], k.shape[1], place, *of[1:])
            scores = index(query, key[:, :, 0], weights)
            logits = score.logits(logits).reshape(b, h, q.shape[1], -1)
            return divergence(logits, lse.mT, scores, live, place)

        sparse = self.options.stage == "sparse"
        lists = [jnp.asarray(x)[:, 0] for x in (mask.ids, mask.count)]
        of = lists if sparse else place.rows(q)
        keys = mask.ids.shape[-1] * k.shape[2] * c if sparse else k.shape[1] * h
        size = CHUNK // (b * keys)
        return in_chunks(
            jax.checkpoint(chosen if sparse else every),
            size,
            *(q, lse.mT, query, weights, *of),
        )


def dsa_select(
    q: Array, k: Array, *, weights: Array, options: DSAOptions, place: Place
) -> BlockMask:
    """Call ``dsa`` with a mixer's options."""
    return dsa(q, k, weights=weights, top=options.top, place=place)
