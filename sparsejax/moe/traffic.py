"""Traffic: what an exchange must move, counted from its shapes alone.

Bytes are of collectives' results on one device, the device's own part included, as
``sparsejax.sharding.hlo.collective_bytes`` counts them in a compiled program. The share
that really leaves a device is ``(devices - 1) / devices`` of it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from sparsejax.config import near
from sparsejax.moe.config import MoEConfig
from sparsejax.moe.mixture import buffer_rows

__all__ = ["Traffic", "exchange_bytes", "traffic_of"]

WORD = 4  # bytes of an id, a weight, a float32 sum


class Traffic(NamedTuple):
    """Bytes by kind of collective, of one layer on one device."""

    forward: dict[str, int]
    backward: dict[str, int]
    again: dict[str, int]  # of a forward pass for the sake of the backward one


def exchange_bytes(
    name: str,
    *,
    tokens: int,
    per_token: int,
    width: int,
    devices: int,
    dtype: DTypeLike = jnp.float32,
    rows: int | None = None,
) -> Traffic:
    """Count what one layer's exchange moves, one time forward and one time back.

    Args:
        name: a name of ``EXCHANGES``.
        tokens: of one device.
        devices: along the expert axis.
        rows: of a buffer between two devices, for all_to_all; None: all slots.

    Raises:
        ValueError: if there is no such exchange.
    """
    row, slots = width * jnp.dtype(dtype).itemsize, tokens * per_token
    if name not in COUNTS:
        raise ValueError(f"exchange={name!r}: no such name{near(name, COUNTS)}")
    return COUNTS[name](tokens, slots, row, width, devices, rows or slots)


def traffic_of(
    config: MoEConfig,
    *,
    tokens: int,
    width: int,
    devices: int,
    dtype: DTypeLike,
    remat: bool,
) -> dict[str, int]:
    """Count what a layer moves in one step, by kind of collective.

    Args:
        config: the layer's.
        tokens: of one device.
        width: of a token.
        devices: along the expert axis; alone, one moves nothing.
        dtype: of a token.
        remat: whether the backward pass computes the layer again.
    """
    if devices == 1:
        return {}
    moved = exchange_bytes(
        config.exchange,
        tokens=tokens,
        per_token=config.slots,
        width=width,
        devices=devices,
        dtype=dtype,
        rows=buffer_rows(config, tokens=tokens, devices=devices),
    )
    passes = moved if remat else moved[:2]
    return {
        kind: config.hops * sum(part.get(kind, 0) for part in passes)
        for kind in sorted({kind for part in passes for kind in part})
    }


def _ring(
    tokens: int, slots: int, row: int, width: int, devices: int, rows: int
) -> Traffic:
    """All tokens come with ids and weights; float32 sums go back."""
    del rows
    sums = tokens * width * WORD
    everyone = {"all-gather": devices * (tokens * row + 2 * slots * WORD)}
    return Traffic(
        everyone | {"reduce-scatter": sums},
        {"all-gather": devices * sums, "reduce-scatter": tokens * row + slots * WORD},
        everyone,
    )


def _all_to_all(
    tokens: int, slots: int, row: int, width: int, devices: int, rows: int
) -> Traffic:
    """A buffer to each device and back, and the ids of its rows."""
    del tokens, slots, width
    forward = {"all-to-all": devices * rows * (2 * row + WORD)}
    return Traffic(forward, {"all-to-all": devices * rows * 2 * row}, forward)


def _ragged(
    tokens: int, slots: int, row: int, width: int, devices: int, rows: int
) -> Traffic:
    """Each slot's row there and back, its id, and the table of sizes.

    A TPU pads each id to 128 words, which a row of 2048 does not notice.
    """
    del tokens, width, rows
    forward = {
        "ragged-all-to-all": slots * (2 * row + WORD),
        "all-gather": devices * devices * WORD,
    }
    return Traffic(forward, {"ragged-all-to-all": slots * 2 * row}, forward)


COUNTS = {"ring": _ring, "all_to_all": _all_to_all, "ragged_all_to_all": _ragged}
