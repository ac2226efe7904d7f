"""Native sparse attention: compressed, selected and near keys, mixed by gates.

Symbols: block ``j`` of the selection has ``block_kv`` keys; compressed key ``m`` stands
for ``length`` keys from ``m * stride`` on.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.attention.attended import Segments, join_sinks
from sparsejax.attention.context import Context, Mixed, Place, listed
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.patterns import Cover, Pattern, Span, sliding_window
from sparsejax.attention.rope import head_norm, rope
from sparsejax.attention.rows import Score
from sparsejax.attention.selection import choose, same_document
from sparsejax.attention.selectors.plain import Mixer, Sizes, Stretch, Work
from sparsejax.config import require
from sparsejax.typing import Array, Float, Int

__all__ = ["NSA", "NSAOptions", "nsa"]


@dataclass(frozen=True, kw_only=True)
class NSAOptions:
    """Sizes in tokens, and the budget in blocks of the layer's ``block_kv``."""

    top: int = 16  # selected blocks of a query, the forced ones included
    first: int = 1  # forced blocks at the beginning
    near: int = 2  # forced blocks up to the query's own
    length: int = 32  # keys that one compressed key stands for
    stride: int = 16
    window: int = 512
    hidden: int = 64  # width of the compression's hidden layer

    def __post_init__(self) -> None:
        for name in ("near", "stride", "window", "hidden"):
            value = getattr(self, name)
            require(value >= 1, name, value, "must be positive")
        require(self.first >= 0, "first", self.first, "must not be negative")
        forced = self.first + self.near
        rule = f"must hold the forced blocks, first + near = {forced}"
        require(self.top >= forced, "top", self.top, rule)
        rule = f"must be a multiple of stride={self.stride}"
        require(self.length % self.stride == 0, "length", self.length, rule)

    def work(self, tokens: int, block_kv: int, sizes: Sizes) -> Work:
        """Count the pairs of the three branches; choosing reads the first one's."""
        at = np.arange(tokens)
        own, place = np.divmod(at, block_kv)
        behind = np.maximum((at + 1 - self.length) // self.stride + 1, 0)
        selected = np.minimum(own, self.top - 1) * block_kv + place + 1
        pairs = behind + selected + np.minimum(at + 1, self.window)
        choosing = 2 * sizes.heads * sizes.head_width * behind.sum()
        return Work(float(pairs.sum()), float(choosing))


@dataclass(frozen=True)
class Completed(Pattern):
    """Compressed keys all of whose keys lie at or before the query."""

    length: int
    stride: int

    def __call__(self, i: Any, j: Any) -> Any:
        """Whether query ``i`` reads compressed key ``j``."""
        return j * self.stride + self.length - 1 <= i

    def cover(self, rows: Span, columns: Span) -> Cover:
        """Judge blocks: visibility rises with ``i`` and falls with ``j``."""
        return Cover(self(rows.last, columns.first), self(rows.first, columns.last))

    def reads(self, rows: Span) -> list[Span]:
        """Give all compressed keys up to the last completed one."""
        last = (rows.last + 1 - self.length) // self.stride
        return [Span(0 * last, last)]

    @property
    def least_offset(self) -> int:
        """Compressed keys lie closer together than keys: never behind a query."""
        return 0


def nsa(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b m g c"],
    *,
    lse: Float[Array, "b h t"],
    kv_len: int,
    block_kv: int,
    options: NSAOptions,
    softcap: float | None = None,
    place: Place = Place(),  # noqa: B008  an immutable default
) -> BlockMask:
    """Choose the blocks that attention over compressed keys ``k`` gives most mass.

    The heads of a group choose together. ``lse`` is that attention's log-denominator,
    ``softcap`` its bound of logits.

    Raises:
        ValueError: if ``top`` exceeds the number of blocks.

    Source: Yuan et al. 2025, arXiv:2502.11089, Eq. 8-12.
    """
    b, t, h, c = q.shape
    columns = -(-kv_len // block_kv)
    m = np.arange(k.shape[1])[:, None] * options.stride
    block = np.arange(columns)[None] * block_kv
    # How many steps of a stride compressed key and block have in common.
    ends = np.minimum(m + options.length, block + block_kv)
    shared = np.maximum(0, ends - np.maximum(m, block)) / options.stride
    grouped = q.astype("float32").reshape(b, t, k.shape[2], -1, c)
    products = jnp.einsum("btgrc,bmgc->bgrtm", grouped, k.astype("float32"))
    logits = Score(c**-0.5, softcap).logits(products)
    lse = lse.reshape(b, k.shape[2], -1, t, 1)
    i = place.positions(t)
    seen = m.T + options.length - 1 <= i[:, None]
    seen = seen[None, None, None] & jnp.isfinite(lse)
    seen = seen & _own_document(place, k.shape[1], options)
    mass = jnp.where(seen, jnp.exp(jnp.where(seen, logits - lse, 0)), 0)
    scores = jnp.einsum("bgrtm,mj->bgtj", mass, jnp.asarray(shared, "float32"))
    block = jnp.arange(columns, dtype="int32")[None, None, None]
    own = (i // block_kv)[None, None, :, None]
    past = (block < own) & same_document(place, block_kv)
    return choose(
        scores.repeat(h // k.shape[2], axis=1),
        past | (block == own),
        forced=(block > own - options.near) | (block < options.first),
        top=place.budget("top", options.top, columns, "blocks"),
        kv_len=kv_len,
        block_kv=block_kv,
        place=place,
    )


def _own_document(place: Place, keys: int, options: NSAOptions) -> Array | bool:
    """Whether a compressed key is all of the query's document, "b 1 1 t m"."""
    if place.segments is None:
        return True
    own, of = place.segments.q[..., None], documents(place, keys, options)
    return ((own == of[:, None]) & (own != 0))[:, None, None]


def documents(place: Place, keys: int, options: NSAOptions) -> Int[Array, "b m"]:
    """Give the document of every compressed key; 0 for one that straddles several."""
    assert place.segments is not None
    starts = np.arange(keys) * options.stride
    parts = place.segments.kv[:, starts[:, None] + np.arange(options.length)[None]]
    same = (parts == parts[..., :1]).all(axis=-1)
    return jnp.where(same, parts[..., 0], 0)


class NSA(Mixer):
    """Three branches of attention and the gates that mix them.

    The selected branch has the layer's keys and values; the others have their own.

    Source: Yuan et al. 2025, arXiv:2502.11089, Eq. 5-12. Departure: compression adds a
    learned correction to the mean, zero at first; gates have a bias.
    """

    def __init__(self, config: Any, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        options = config.options
        self.config, self.options = config, options
        d, h, g, c = sizes
        l, f = options.length, options.hidden  # noqa: E741
        normal = lambda *shape: jax.random.normal(rngs.params(), shape)  # noqa: E731
        # The first of two is for the compressed branch, the second for the near one.
        self.keys = nnx.Param(normal(2, d, g, c) * d**-0.5, axes="2 d g c")
        self.values = nnx.Param(normal(2, d, g, c) * d**-0.5, axes="2 d g c")
        if config.qk_norm:
            self.key_norms = nnx.Param(jnp.ones((2, c)), axes="2 c")
        # The first of two is for keys, the second for values.
        self.place = nnx.Param(0.02 * normal(2, l, c), axes=f"2 {l} c")
        self.inner = nnx.Param(
            normal(2, l, c, f) * (l * c) ** -0.5, axes=f"2 {l} c {f}"
        )
        self.outer = nnx.Param(jnp.zeros((2, f, c)), axes=f"2 {f} c")
        self.gate = nnx.Param(normal(d, h, 3) * d**-0.5, axes="d h 3")
        self.gate_bias = nnx.Param(jnp.zeros((h, 3)), axes="h 3")

    def features(
        self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]
    ) -> dict[str, Array]:
        """Keys and values of the branches that do not use the layer's."""
        keys, values = (
            [jnp.einsum("btd,dgc->btgc", x, w) for w in p[...].astype(x.dtype)]
            for p in (self.keys, self.values)
        )
        if self.config.qk_norm:
            pairs = zip(keys, self.key_norms[...], strict=True)
            epsilon = self.config.norm_epsilon
            keys = [head_norm(k, scale, epsilon=epsilon) for k, scale in pairs]
        turning = {"theta": self.config.rope_theta, "scaling": self.config.rope_scaling}
        keys = [rope(k, positions, **turning) for k in keys]
        names = "compressed", "near"
        kept = {f"{n}_keys": k for n, k in zip(names, keys, strict=True)}
        return kept | {f"{n}_values": v for n, v in zip(names, values, strict=True)}

    def stretch(self, keys: int) -> Stretch:
        """Give the keys that one compressed key stands for."""
        del keys
        return Stretch(self.options.length, self.options.stride)

    def summaries(
        self, k: Float[Array, "b s g c"], features: dict[str, Array]
    ) -> dict[str, Array]:
        """Compress keys and values of the first branch."""
        del k
        return {
            name: self._compressed(features[f"compressed_{name}"], which)
            for which, name in enumerate(("keys", "values"))
        }

    def _compressed(
        self, x: Float[Array, "b s g c"], which: int
    ) -> Float[Array, "b m g c"]:
        """Let one vector stand for the keys (0) or values (1) of a stretch."""
        stretch = self.stretch(x.shape[1])
        starts = np.arange(stretch.number(x.shape[1])) * stretch.stride
        parts = x[:, starts[:, None] + np.arange(stretch.length)[None]]
        place, inner, outer = (
            p[...][which].astype(x.dtype) for p in (self.place, self.inner, self.outer)
        )
        placed = parts + place[None, None, :, None]
        hidden = nnx.relu(jnp.einsum("bmwgc,wcf->bmgf", placed, inner))
        return parts.mean(axis=2) + hidden @ outer

    def __call__(
        self,
        q: Float[Array, "b t h c"],
        k: Float[Array, "b s g c"],
        v: Float[Array, "b s g c"],
        x: Float[Array, "b t d"],
        context: Context,
    ) -> Mixed:
        """Attend in three ways and mix them by gates."""
        kept = {n: a.astype(x.dtype) for n, a in context.features.items()}
        behind = context.summaries or self.summaries(k, kept)
        behind = [behind[name].astype(x.dtype) for name in ("keys", "values")]
        arrays = q, *behind, k, v, kept["near_keys"], kept["near_values"]

        def local(place: Place, q: Array, *rest: Any) -> Any:
            *kv, sinks = rest
            (kc, vc), (ks, vs), (kn, vn) = kv[:2], kv[2:4], kv[4:]
            first, lse = self._compressed_branch(context, q, kc, vc, sinks, place)
            chosen = nsa(
                q,
                kc,
                lse=lse,
                kv_len=k.shape[1],
                block_kv=min(context.config.block_kv, k.shape[1]),
                options=self.options,
                softcap=context.config.softcap,
                place=place,
            )
            near = self._mask(q, kn, sliding_window(self.options.window), place)
            second = context.attended(q, ks, vs, chosen, place, sinks=sinks).values
            third = context.attended(q, kn, vn, near, place, sinks=sinks).values
            return first, second, third, listed(chosen, q)

        sinks = None if context.sinks is None else "h"
        *values, density = context.local(
            local,
            *(*arrays, context.sinks),
            axes=("b t h c", *["b s g c"] * 6, sinks),
            outputs=("b t h c", "b t h c", "b t h c", "b t h"),
        )
        wide = jnp.einsum("btd,dhk->bthk", x, self.gate[...].astype(x.dtype))
        gates = nnx.sigmoid(wide.astype("float32") + self.gate_bias[...][None, None])
        shares = [gates[..., n, None].astype(x.dtype) for n in range(3)]
        parts = [a * b for a, b in zip(shares, values, strict=True)]
        mixed = parts[0] + parts[1] + parts[2]
        metrics = {"density": density.mean(), "gates": gates.mean(axis=(0, 1, 2))}
        return Mixed(mixed, {}, metrics)

    def _mask(self, q: Array, k: Array, pattern: Pattern, place: Place) -> BlockMask:
        t, s = q.shape[1], k.shape[1]
        return BlockMask.from_pattern(
            pattern,
            q_len=t,
            kv_len=s,
            block_q=min(self.config.block_q, t),
            block_kv=min(self.config.block_kv, s),
            q_offset=place.q_offset,
        )

    def _compressed_branch(
        self, context: Context, q: Array, k: Array, v: Array, sinks: Any, place: Place
    ) -> tuple[Array, Array]:
        """Values, and the log-denominator before sinks."""
        options, numbers = self.options, place.segments
        if not k.shape[1]:
            return jnp.zeros_like(q), jnp.full_like(q[..., 0].mT, -jnp.inf, "float32")
        if numbers is not None:
            of = documents(place, k.shape[1], options)
            numbers = Segments(numbers.q, of)
        mask = self._mask(q, k, Completed(options.length, options.stride), place)
        place = place._replace(segments=numbers)
        found = context.attended(q, k, v, mask, place)
        lse = jax.lax.stop_gradient(found.lse)
        return (found if sinks is None else join_sinks(found, sinks)).values, lse
