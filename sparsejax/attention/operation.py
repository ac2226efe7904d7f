"""Block-sparse attention: one operation, several implementations that agree.

Queries "b t h c" read keys and values "b s g c" where the ``BlockMask`` lets them;
query head ``h`` reads key head ``h // (heads // key heads)``. Values may be wider or
narrower than queries and keys. A query that sees nothing gives 0 and a log-denominator
of -inf, and receives gradient 0.
"""

from sparsejax.attention.attended import Attended, Segments, join_sinks
from sparsejax.attention.mask import BlockMask
from sparsejax.attention.reference import reference
from sparsejax.attention.rows import pad
from sparsejax.attention.xla import xla
from sparsejax.config import choose
from sparsejax.late import late
from sparsejax.partition import platform
from sparsejax.typing import Array, Float

__all__ = [
    "IMPLEMENTATIONS",
    "block_sparse_attention",
    "block_sparse_attention_and_lse",
    "takes_lists",
]

IMPLEMENTATIONS = {
    "reference": reference,
    "xla": xla,
    "mosaic_tpu": late("sparsejax.attention.mosaic_tpu", "mosaic_tpu"),
    "mosaic_gpu": late("sparsejax.attention.mosaic_gpu", "mosaic_gpu"),
}
obstacle = late("sparsejax.attention.mosaic_gpu", "obstacle")
LISTS = frozenset({"reference", "xla"})  # take blocks of any size, a query each even


def takes_lists(implementation: str | None) -> bool:
    """Whether an implementation takes blocks of single queries and keys."""
    if implementation is None:
        return platform() != "tpu"
    return implementation in LISTS


def _by_platform(q: Array, v: Array, mask: BlockMask) -> str:
    """The kernels for this hardware; on a GPU, if they take such work."""
    if platform() == "tpu":
        return "mosaic_tpu"
    widest = max(q, v, key=lambda x: x.shape[3])
    fits = platform() == "gpu" and obstacle(widest, mask) is None
    return "mosaic_gpu" if fits else "xla"


def block_sparse_attention(  # noqa: PLR0913  the signature of the design
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    v: Float[Array, "b s g _"],
    mask: BlockMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    segments: Segments | None = None,
    bias: Float[Array, "b g s"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h _"]:
    """Attend where the mask lets it; see ``block_sparse_attention_and_lse``."""
    return block_sparse_attention_and_lse(
        q,
        k,
        v,
        mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        segments=segments,
        bias=bias,
        implementation=implementation,
    ).values


def block_sparse_attention_and_lse(  # noqa: PLR0913  the signature of the design
    q: Float[Array, "b t h c"],
    k: Float[Array, "b s g c"],
    v: Float[Array, "b s g _"],
    mask: BlockMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    segments: Segments | None = None,
    bias: Float[Array, "b g s"] | None = None,
    implementation: str | None = None,
) -> Attended:
    """Attend where the mask lets it, and give the softmax's log-denominator too.

    Args:
        scale: multiplies the products of queries and keys; default ``c ** -0.5``.
        softcap: bounds the logits smoothly, ``softcap * tanh(logits / softcap)``.
        sinks: one more logit per query head, of value 0, in the denominator.
        segments: packed documents; positions see each other only within one.
        bias: added to the logits of each key, after scale and softcap; -inf hides it.
        implementation: a name in ``IMPLEMENTATIONS``; None picks by platform:
            ``mosaic_tpu`` on a TPU, ``mosaic_gpu`` on a Hopper GPU for 16-bit heads of
            at most 128 in blocks of multiples of 64, and ``xla`` otherwise.

    Raises:
        ValueError: if shapes, heads, mask and segments do not fit together, or no
            implementation has that name.
    """
    _check(q, k, v, mask)
    _check_extras(q, k, softcap, sinks, segments)
    _check_bias(k, bias)
    name = _by_platform(q, v, mask) if implementation is None else implementation
    choose("implementation", name, IMPLEMENTATIONS)
    arrays = (q, k, v) if name in LISTS else _equally_wide(q, k, v)
    attended = IMPLEMENTATIONS[name](
        *arrays,
        mask,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        segments=segments,
        bias=bias,
    )
    if sinks is not None:
        attended = join_sinks(attended, sinks)
    values = attended.values[..., : v.shape[3]].astype(q.dtype)
    return attended._replace(values=values)


def _equally_wide(*arrays: Array) -> tuple[Array, ...]:
    """Give the narrower heads channels of 0: the kernels know one width only."""
    width = max(x.shape[-1] for x in arrays)
    return tuple(pad(x, 3, width) for x in arrays)


def _check(q: Array, k: Array, v: Array, mask: BlockMask) -> None:
    b, t, h, c = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != b or k.shape[3] != c:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: k and v must agree in all but"
            " their width, and k share batch and head width with q"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype"
        )
    if h % k.shape[2]:
        raise ValueError(
            f"{h} query heads do not group over {k.shape[2]} key heads; the first must"
            " be a multiple of the second"
        )
    if (mask.q_len, mask.kv_len) != (t, k.shape[1]):
        raise ValueError(
            f"the mask is for {mask.q_len} x {mask.kv_len} positions, q and k have"
            f" {t} x {k.shape[1]}; build it with these lengths"
        )
    if mask.ids.shape[0] not in (1, b) or mask.ids.shape[1] not in (1, h):
        raise ValueError(
            f"the mask has batch and heads {mask.ids.shape[:2]}; each must be 1 or that"
            f" of q, {(b, h)}"
        )


def _check_extras(
    q: Array,
    k: Array,
    softcap: float | None,
    sinks: Array | None,
    segments: Segments | None,
) -> None:
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: must be positive; None for no cap")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks {sinks.shape}: needs one logit for each query head")
    if segments is None:
        return
    found, needed = (segments.q.shape, segments.kv.shape), (q.shape[:2], k.shape[:2])
    if found != needed:
        raise ValueError(f"segments of shapes {found}: q and k need {needed}")


def _check_bias(k: Array, bias: Array | None) -> None:
    if bias is None:
        return
    needed = (k.shape[0], k.shape[2], k.shape[1])
    if bias.shape != needed or bias.dtype != "float32":
        raise ValueError(
            f"bias {bias.dtype}{bias.shape}: needs float32 and one value for each batch"
            f" element, key head and key, {needed}"
        )
