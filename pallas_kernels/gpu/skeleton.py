"""The frame of every kernel: programs own tiles and walk the tiles of their lists.

A memory warpgroup copies the listed tiles, by id, into a ring of slots; compute
warpgroups of 64 rows each consume them, the listed blocks that need no element rule
first. Arrays are "b t h c" or "b h t"; one with fewer heads is shared by groups of
query heads.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import ROWS, put, swizzle, tile

__all__ = ["Lists", "Own", "Piece", "Plan", "Traffic", "launch"]

MOST_SLOTS = 4
SMEM_BYTES = 232448 - 1024  # what a block may ask for, less barriers and alignment
# Registers of a thread in a compute and in the memory warpgroup. Shares that exceed
# 65536 / 128 together compile, and then wait for ever on the device.
REGISTERS = {1: (232, 40), 2: (232, 40)}


class Lists(NamedTuple):
    """Listed blocks per row, in int32: ``full <= count <= ids.shape[-1]``."""

    ids: Any  # "b h i j", with b and h possibly 1; never read past ``count``
    count: Any  # "b h i"
    full: Any  # "b h i": leading blocks that need no element rule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Static sizes, in positions."""

    heads: int  # of the queries
    own: int  # the tile of a program
    step: int  # a tile of the ring
    own_block: int  # what one row of the lists stands for
    step_block: int  # what one listed id stands for
    splits: int = 1  # own tiles that share one list
    slots: int | None = None  # of the ring; None takes what fits
    in_turns: bool = False  # two warpgroups: one multiplies, the other exponentiates
    last_first: bool = True  # long causal lists start first: those of the last queries
    # Programs that share the own tiles, each taking the next one's first copies up
    # while it writes the last one's results; None has a program for every own tile.
    programs: int | None = None


def _over(n: Any, d: int) -> Any:
    return n if d == 1 else lax.div(n, jnp.int32(d))


@dataclass(frozen=True)
class Own:
    """One own tile, as one warpgroup sees it."""

    plan: Plan
    refs: dict[str, Any]  # arrays in device memory
    tiles: dict[str, Any]  # tiles and barriers in shared memory
    batch: Any
    head: Any  # query head
    row: Any
    group: Any  # which warpgroup
    turn: Any  # pieces that the program has walked before

    @property
    def start(self) -> Any:
        """First own position of this warpgroup."""
        row = _over(self.row, self.plan.splits)
        return row * self.plan.own + self.group * ROWS

    @property
    def at(self) -> Any:
        """Which list."""
        ids, row = (
            self.refs["ids"],
            _over(self.row, self.plan.own_block // self.plan.own),
        )
        return self.of_batch(ids.shape[0]), self.of_head(ids.shape[1]), row

    @property
    def pieces(self) -> tuple[Any, Any]:
        """Walked tiles that need no element rule, and all of them."""
        each = self.plan.step_block // self.plan.step
        return tuple(self.refs[name][self.at] * each for name in ("full", "count"))

    def tile(self, name: str) -> Any:
        """Give this warpgroup's part of a tile that does not change."""
        return self.tiles[name].at[self.group]

    def of_head(self, count: int) -> Any:
        """Index on an axis of ``count`` heads."""
        return _over(self.head, self.plan.heads // count)

    def of_batch(self, count: int) -> Any:
        """Index of the batch element on an axis of ``count``."""
        return self.batch if count > 1 else 0

    def part(self, name: str, start: Any, length: int) -> Any:
        """View some positions of an array "b t h c" or "b h t"."""
        ref, span = self.refs[name], pl.ds(start, length)
        if len(ref.shape) == 4:
            return ref.at[self.batch, span, self.of_head(ref.shape[2])]
        return ref.at[self.batch, self.of_head(ref.shape[1]), span]

    def meet(self) -> None:
        """Meet the other warpgroup, if they work in turns."""
        if "turn" in self.tiles:
            plgpu.barrier_arrive(self.tiles["turn"])
            plgpu.barrier_wait(self.tiles["turn"])

    def half_a_turn(self, group: int) -> None:
        """Let one warpgroup meet the other once more, to shift their turns."""
        pl.when(self.group == group)(self.meet)

    def walk(self, visit: Callable[..., Any], carry: Any, pieces: Any) -> Any:
        """Thread ``carry`` through ``visit(piece, carry, ruled=...)`` in list order."""

        def one(n: Any, carry: Any, *, ruled: bool) -> Any:
            return visit(Piece(self, n), carry, ruled=ruled)

        free, all_ = pieces
        carry = lax.fori_loop(0, free, functools.partial(one, ruled=False), carry)
        return lax.fori_loop(free, all_, functools.partial(one, ruled=True), carry)

    def fetch(self, names: tuple[str, ...]) -> None:
        """Start the copies of this warpgroup's own tiles."""
        for name in names:
            source = self.part(name, self.start, ROWS)
            plgpu.copy_gmem_to_smem(
                source, self.tile(name), self.tiles["own"].at[self.group]
            )

    def store(self, *results: tuple[str, Any, jax.Array]) -> None:
        """Send results (name, tile to go through, value) to device memory."""
        for _, through, value in results:
            put(through, value)
        start = self.row * self.plan.own + self.group * ROWS
        for name, through, _ in results:
            plgpu.copy_smem_to_gmem(through, self.part(name, start, ROWS))
        # The tiles are used again, or die with the program.
        plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True)
class Piece:
    """One walked tile."""

    own: Own
    n: Any  # which tile of the list

    @property
    def turn(self) -> Any:
        """Which tile of the program."""
        return self.own.turn + self.n

    @property
    def slot(self) -> Any:
        """Place in the ring."""
        return self._slot(self.turn)

    def _slot(self, turn: Any) -> Any:
        return lax.rem(turn, jnp.int32(self.own.plan.slots))

    @property
    def start(self) -> Any:
        """First position."""
        plan = self.own.plan
        pieces = plan.step_block // plan.step
        block = self.own.refs["ids"][(*self.own.at, _over(self.n, pieces))]
        place = lax.rem(self.n, jnp.int32(pieces))
        return block * plan.step_block + place * plan.step

    def wait(self, *names: str) -> list[Any]:
        """Wait for the tiles of one stream."""
        tiles, slot = self.own.tiles, self.slot
        plgpu.barrier_wait(tiles["ready_" + names[0]].at[slot])
        return [tiles[name].at[slot] for name in names]

    def free(self, *names: str) -> None:
        """Give the tiles of one stream back."""
        plgpu.barrier_arrive(self.own.tiles["free_" + names[0]].at[self.slot])

    def free_last(self, *names: str) -> None:
        """Give the tiles of the program's piece before this one back."""
        free, last = self.own.tiles["free_" + names[0]], self._slot(self.turn - 1)
        pl.when(self.turn > 0)(lambda: plgpu.barrier_arrive(free.at[last]))

    @contextlib.contextmanager
    def fed(self, *names: str) -> Iterator[Any]:
        """Wait for the tiles of one stream; leaving gives them back."""
        yield self.wait(*names)
        self.free(*names)

    def feed(self, streams: tuple[tuple[str, ...], ...]) -> None:
        """Copy the tiles of the streams into their slots, as these get free."""
        own, slot = self.own, self.slot
        # Read once: the list lies in device memory, several hundred cycles away.
        start = self.start
        refill = self.turn >= own.plan.slots
        for names in streams:
            free, ready = (own.tiles[kind + names[0]] for kind in ("free_", "ready_"))
            pl.when(refill)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            for name in names:
                source = own.part(name, start, own.plan.step)
                plgpu.copy_gmem_to_smem(
                    source, own.tiles[name].at[slot], ready.at[slot]
                )


class Traffic(NamedTuple):
    """Which arrays a kernel moves, by name."""

    arrays: dict[str, jax.Array]  # operands
    own: tuple[str, ...]  # copied once
    streams: tuple[tuple[str, ...], ...]  # walked; each behind barriers of its own
    outputs: dict[str, jax.ShapeDtypeStruct]
    work: dict[str, Any]  # more tiles "64 columns" per warpgroup: columns, dtype


def _scratch(plan: Plan, traffic: Traffic) -> tuple[Plan, dict[str, Any]]:
    """Shared memory by name, and the plan with its number of slots."""

    def columns(name: str) -> tuple[int, ...]:
        shape = traffic.arrays[name].shape
        return shape[3:]

    groups, arrays = plan.own // ROWS, traffic.arrays
    fixed = {n: ((ROWS, *columns(n)), arrays[n].dtype) for n in traffic.own}
    fixed |= {n: ((ROWS, *c), dtype) for n, (c, dtype) in traffic.work.items()}
    fed = {
        n: ((plan.step, *columns(n)), arrays[n].dtype)
        for names in traffic.streams
        for n in names
    }
    size = [
        sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in x.values())
        for x in (fixed, fed)
    ]
    fitting = min(MOST_SLOTS, (SMEM_BYTES - groups * size[0]) // size[1])
    slots = plan.slots or fitting
    if not 1 < slots <= fitting:
        raise ValueError(
            f"tiles of {plan.own} x {plan.step} positions in {max(slots, 2)} slots need"
            f" {groups * size[0] + max(slots, 2) * size[1]} bytes of shared memory,"
            f" there are {SMEM_BYTES}: use smaller tiles or fewer slots"
        )
    matrices = [x for x in (fixed | fed).values() if len(x[0]) == 2]
    # The operands of a wgmma must be swizzled alike.
    width = min(swizzle(shape[1], dtype) for shape, dtype in matrices)
    tiles = {n: tile((groups, *s), d, width) for n, (s, d) in fixed.items()}
    tiles |= {n: tile((slots, *s), d, width) for n, (s, d) in fed.items()}
    if plan.in_turns and groups == 2:
        tiles["turn"] = plgpu.Barrier(num_arrivals=groups)
    tiles["own"] = plgpu.Barrier(num_arrivals=len(traffic.own), num_barriers=groups)
    for names in traffic.streams:
        tiles["ready_" + names[0]] = plgpu.Barrier(
            num_arrivals=len(names), num_barriers=slots
        )
        tiles["free_" + names[0]] = plgpu.Barrier(
            num_arrivals=groups, num_barriers=slots
        )
    return replace(plan, slots=slots), tiles


def _check(plan: Plan) -> None:
    for name, value in (("own", plan.own), ("step", plan.step)):
        block = getattr(plan, f"{name}_block")
        if value % ROWS or block % value:
            raise ValueError(
                f"{name}={value}: must be a multiple of {ROWS} and divide {block}, the"
                " block of the lists"
            )
    if plan.own // ROWS not in REGISTERS:
        raise ValueError(f"own={plan.own}: registers suffice for tiles of 64 or 128")


def _places(
    index: Any, grid: tuple[int, int, int], *, last_first: bool
) -> tuple[Any, Any, Any]:
    """Batch element, head and row of an own tile; heads that share keys are close."""
    rows, batches, heads = grid
    batch = _over(index, heads)
    row = _over(batch, batches)
    batch, head = lax.rem(batch, jnp.int32(batches)), lax.rem(index, jnp.int32(heads))
    return batch, head, rows - 1 - row if last_first else row


def _deal(one: Callable[..., Any], program: Any, programs: int, total: int) -> None:
    """Thread a number through ``one(index, number)`` for a program's share of a total.

    Shares are dealt out forth and back, so that whoever gets the longest of one round
    gets the shortest of the next.
    """
    if programs == total:
        one(program, jnp.int32(0))
        return
    back, (rounds, rest) = programs - 1 - program, divmod(total, programs)
    last = back if rounds % 2 else program

    def of_round(n: Any, number: Any) -> Any:
        place = jnp.where(lax.rem(n, jnp.int32(2)) == 0, program, back)
        return one(n * programs + place, number)

    count = rounds + (last < rest).astype(jnp.int32)
    lax.fori_loop(0, count, of_round, jnp.int32(0))


def launch(
    body: Callable[[Own, Any], None],
    *,
    plan: Plan,
    grid: tuple[int, int, int],
    lists: Lists,
    traffic: Traffic,
) -> Any:
    """Run ``body(own, pieces)`` in the compute warpgroups, for every own tile.

    Args:
        body: what a warpgroup does once its own tiles have come.
        plan: static sizes.
        grid: own tiles, batch elements, query heads.
        lists: what each own tile walks.
        traffic: arrays by name.

    Raises:
        ValueError: if tiles do not divide blocks or do not fit shared memory.
    """
    _check(plan)
    plan, scratch = _scratch(plan, traffic)
    groups, total = plan.own // ROWS, math.prod(grid)
    programs = min(total, plan.programs or total)
    names = [*Lists._fields, *traffic.arrays, *traffic.outputs]

    def kernel(*refs: Any, **tiles: Any) -> None:
        group, program = lax.axis_index("group"), lax.axis_index("program")

        def each(visit: Callable[[Own, Any], Any]) -> None:
            def one(index: Any, turn: Any) -> Any:
                where = _places(index, grid, last_first=plan.last_first)
                named = dict(zip(names, refs, strict=True))
                tile = Own(plan, named, tiles, *where, group, turn)
                pieces = tile.pieces
                visit(tile, pieces)
                return turn + pieces[1]

            _deal(one, program, programs, total)

        @pl.when(group < groups)
        def _() -> None:
            def compute(tile: Own, pieces: Any) -> None:
                tile.fetch(traffic.own)
                plgpu.barrier_wait(tiles["own"].at[group])
                body(tile, pieces)

            plgpu.set_max_registers(REGISTERS[groups][0], action="increase")
            each(compute)

        @pl.when(group == groups)
        def _() -> None:
            def feed(piece: Piece, carry: None, *, ruled: bool) -> None:  # noqa: ARG001
                piece.feed(traffic.streams)

            plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")
            each(lambda tile, pieces: tile.walk(feed, None, pieces))

    found = plgpu.kernel(
        kernel,
        out_type=tuple(traffic.outputs.values()),
        grid=(programs,),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*lists, *traffic.arrays.values())
    return dict(zip(traffic.outputs, found, strict=True))
