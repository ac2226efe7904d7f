"""The frame of products by lists: persistent programs walk a list of output tiles.

A memory warpgroup copies operands into a ring of slots, some tiles ahead; each compute
warpgroup of 64 rows adds products in registers and stores its part of the tile. What is
listed, copied and stored is the caller's ``Work``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import ROWS, accumulate, accumulator, put, tile

__all__ = [
    "STEP",
    "Tiling",
    "Work",
    "check",
    "in_panels",
    "launch",
    "piece",
    "send",
]

STEP = 64  # contracted at a step; also the columns of a stored piece
WIDTH = 128  # bytes of the swizzle, one step of 16-bit numbers
SMEM_BYTES = 232448 - 1024
REGISTERS = 232, 40  # of a thread in a compute and in the memory warpgroup


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Static sizes of a kernel."""

    rows: int = 128  # of an output tile, 64 for each compute warpgroup
    columns: int = 256  # of an output tile
    slots: int = 4  # of the ring
    buffers: int = 1  # for finished pieces on their way out
    panel: int = 16  # tiles of rows that share columns before the next columns
    programs: int = 132  # one for each multiprocessor

    @property
    def groups(self) -> int:
        """How many compute warpgroups."""
        return self.rows // ROWS


class Work(NamedTuple):
    """What distinguishes the products.

    An item is an output tile: a named tuple of scalars with ``column``, its first one,
    and ``steps`` at least.
    """

    items: Callable[[Any], Any]  # refs -> how many
    item: Callable[[Any, Any], Any]  # refs, number -> item
    left: Callable[..., Any]  # refs, item, step, warpgroup -> part in device memory
    right: Callable[..., Any]  # refs, item, step -> part in device memory
    views: tuple[Callable[[Any], Any], Callable[[Any], Any]]
    prepare: Callable[..., None] | None  # before a product, may change its operands
    store: Callable[..., None]


def in_panels(number: Any, rows: Any, columns: int, panel: int) -> tuple[Any, Any]:
    """Row and column of a tile when some rows walk all columns together.

    Programs work on neighbours in this order at one time, and find the operands that
    they share in the cache.
    """
    before = lax.div(number, jnp.int32(panel * columns)) * panel
    inside = lax.rem(number, jnp.int32(panel * columns))
    tall = jnp.minimum(rows - before, panel)
    return before + lax.rem(inside, tall), lax.div(inside, tall)


def check(tiling: Tiling, *, rows: int, contracted: int, columns: int) -> None:
    """Refuse sizes that do not fit tiles, and tiles that do not fit the device."""
    size = _bytes(tiling)
    if tiling.groups not in (1, 2) or tiling.rows % ROWS or rows < tiling.rows:
        raise ValueError(
            f"tiles of {tiling.rows} rows for {rows}: must be 64 or 128 and no more"
        )
    if columns % tiling.columns or tiling.columns not in (64, 128, 256):
        raise ValueError(
            f"tiles of {tiling.columns} columns for {columns}: must be 64, 128 or 256"
            " and divide them; pad them to a multiple of 64"
        )
    if contracted % STEP:
        raise ValueError(f"{contracted} contracted: pad it to a multiple of {STEP}")
    if size > SMEM_BYTES:
        raise ValueError(
            f"{tiling} needs {size} bytes of shared memory, there are {SMEM_BYTES}:"
            " use fewer slots or smaller tiles"
        )


def _bytes(tiling: Tiling) -> int:
    ring = tiling.slots * (tiling.rows + tiling.columns) * STEP
    out = (tiling.buffers + 1) * tiling.rows * STEP
    return 2 * (ring + out)


def piece(y: jax.Array, n: int) -> jax.Array:
    """Some columns of a tile."""
    return y[:, n * STEP : (n + 1) * STEP]


def send(tiles: Any, group: Any, n: int, y: jax.Array, target: Any) -> None:
    """Send the n-th piece of a tile to device memory."""
    buffers = tiles["out"].shape[1]
    through = tiles["out"].at[group, n % buffers]
    plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
    put(through, piece(y, n))
    plgpu.copy_smem_to_gmem(through, target)


def _scratch(tiling: Tiling, dtype: Any, right: tuple[int, int]) -> dict[str, Any]:
    groups, slots = tiling.groups, tiling.slots
    return {
        "a": tile((slots, groups, ROWS, STEP), dtype, WIDTH),
        "b": tile((slots, *right), dtype, WIDTH),
        "out": tile((groups, tiling.buffers, ROWS, STEP), dtype, WIDTH),
        "plain": plgpu.SMEM((groups, ROWS, STEP), dtype),
        "ready": plgpu.Barrier(num_arrivals=groups + 1, num_barriers=slots),
        "free": plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
        "cleared": plgpu.Barrier(num_arrivals=groups),
    }


def launch(
    work: Work,
    tiling: Tiling,
    table: dict[str, jax.Array],
    operands: dict[str, jax.Array],
    shape: jax.ShapeDtypeStruct,
    right: tuple[int, int],
) -> jax.Array:
    """Run the work.

    Args:
        work: what is listed, copied and stored.
        tiling: static sizes.
        table: int32 vectors that ``work`` reads.
        operands: "left" and "right".
        shape: of the result.
        right: of the right tile.
    """
    names = [*table, *operands, "out"]
    groups = tiling.groups

    def kernel(*given: Any, **tiles: Any) -> None:
        refs = dict(zip(names, given, strict=True))
        program, group = lax.axis_index("program"), lax.axis_index("group")
        every, total = jnp.int32(tiling.programs), work.items(refs)
        count = lax.div(total - program + (every - 1), every)

        def find(n: Any) -> Any:
            return work.item(refs, jnp.minimum(program + n * every, total - 1))

        def walk(visit: Callable[[Any, Any], None]) -> None:
            def one(n: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                turn, item = carry
                following = find(n + 1)  # asked for early: it arrives meanwhile
                item = item._replace(column=pl.multiple_of(item.column, STEP))
                visit(item, turn)
                return turn + item.steps, following

            lax.fori_loop(0, count, one, (jnp.int32(0), find(jnp.int32(0))))

        @pl.when(group < groups)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            walk(lambda item, turn: _compute(work, tiling, refs, tiles, item, turn))
            plgpu.wait_smem_to_gmem(0)  # shared memory dies with the program

        @pl.when(group == groups)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            walk(lambda item, turn: _feed(work, tiling, refs, tiles, item, turn))

    y = plgpu.kernel(
        kernel,
        out_type=shape,
        grid=(tiling.programs,),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=_scratch(tiling, shape.dtype, right),
    )(*table.values(), *operands.values())
    # Under a mesh all operands vary alike, and so does what is made of them.
    varying = jax.typeof(operands["left"]).manual_axis_type.varying
    known = jax.typeof(y).manual_axis_type.varying
    return lax.pcast(y, tuple(varying - known), to="varying")


def _feed(
    work: Work, tiling: Tiling, refs: Any, tiles: Any, item: Any, turn: Any
) -> None:
    """Copy the operands of every step into the next slot, once it is free."""

    def step(k: Any, carry: None) -> None:
        slot = lax.rem(turn + k, jnp.int32(tiling.slots))
        refill = turn + k >= tiling.slots
        pl.when(refill)(lambda: plgpu.barrier_wait(tiles["free"].at[slot]))
        ready = tiles["ready"].at[slot]
        for n in range(tiling.groups):
            source = work.left(refs, item, k, n)
            plgpu.copy_gmem_to_smem(source, tiles["a"].at[slot, n], ready)
        source = work.right(refs, item, k)
        plgpu.copy_gmem_to_smem(source, tiles["b"].at[slot], ready)
        return carry

    lax.fori_loop(0, item.steps, step, None)


def _compute(
    work: Work, tiling: Tiling, refs: Any, tiles: Any, item: Any, turn: Any
) -> None:
    """Add up all steps of a tile, and store it."""
    group = lax.axis_index("group")

    def give_back(k: Any) -> None:
        slot = lax.rem(turn + k, jnp.int32(tiling.slots))
        plgpu.barrier_arrive(tiles["free"].at[slot])

    def run(acc: Any) -> jax.Array:
        def step(k: Any, carry: None) -> None:
            slot = lax.rem(turn + k, jnp.int32(tiling.slots))
            plgpu.barrier_wait(tiles["ready"].at[slot])
            a, b = tiles["a"].at[slot, group], tiles["b"].at[slot]
            if work.prepare is not None:
                work.prepare(tiles, item, k, group, a, b)
            accumulate(acc, work.views[0](a), work.views[1](b))
            plgpu.wgmma_wait(1)  # all but the product just begun
            pl.when(k > 0)(lambda: give_back(k - 1))
            return carry

        lax.fori_loop(0, item.steps, step, None)
        return acc[...]  # waits

    y = pl.run_scoped(run, accumulator(ROWS, tiling.columns))
    pl.when(item.steps > 0)(lambda: give_back(item.steps - 1))
    work.store(refs, tiles, item, group, y)
