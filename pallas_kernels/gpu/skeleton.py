"""The frame of every kernel: a program owns one tile and walks the tiles of its list.

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

__all__ = ["Lists", "Piece", "Plan", "Program", "Traffic", "launch"]

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
    members: int = 1  # query heads that one program walks
    splits: int = 1  # programs that share the list of one own tile
    slots: int | None = None  # of the ring; None takes what fits
    in_turns: bool = False  # two warpgroups: one multiplies, the other exponentiates


def _over(n: Any, d: int) -> Any:
    return n if d == 1 else lax.div(n, jnp.int32(d))


@dataclass(frozen=True)
class Program:
    """What one warpgroup of one program works on."""

    plan: Plan
    refs: dict[str, Any]  # arrays in device memory
    tiles: dict[str, Any]  # tiles and barriers in shared memory
    batch: Any
    head: Any  # the first of its query heads
    row: Any
    group: Any  # which warpgroup

    @property
    def start(self) -> Any:
        """First own position of this warpgroup."""
        row = _over(self.row, self.plan.splits)
        return row * self.plan.own + self.group * ROWS

    def own(self, name: str) -> Any:
        """Give this warpgroup's part of a tile that does not change."""
        return self.tiles[name].at[self.group]

    def of_head(self, head: Any, count: int) -> Any:
        """Index of a query head on an axis of ``count`` heads."""
        return _over(head, self.plan.heads // count)

    def of_batch(self, count: int) -> Any:
        """Index of the batch element on an axis of ``count``."""
        return self.batch if count > 1 else 0

    def part(self, name: str, head: Any, start: Any, length: int) -> Any:
        """View some positions of an array "b t h c" or "b h t"."""
        ref, span = self.refs[name], pl.ds(start, length)
        if len(ref.shape) == 4:
            return ref.at[self.batch, span, self.of_head(head, ref.shape[2])]
        return ref.at[self.batch, self.of_head(head, ref.shape[1]), span]

    def turn(self) -> None:
        """Meet the other warpgroup, if they work in turns."""
        if "turn" in self.tiles:
            plgpu.barrier_arrive(self.tiles["turn"])
            plgpu.barrier_wait(self.tiles["turn"])

    def half_a_turn(self, group: int) -> None:
        """Let one warpgroup meet the other once more, to shift their turns."""
        pl.when(self.group == group)(self.turn)

    def walk(self, visit: Callable[..., Any], carry: Any) -> Any:
        """Thread ``carry`` through ``visit(piece, carry, ruled=...)`` in list order."""
        plan, (ids, count, full) = self.plan, (self.refs[n] for n in Lists._fields)
        row = _over(self.row, plan.own_block // plan.own)
        pieces = plan.step_block // plan.step

        def one_head(member: Any, state: Any) -> Any:
            before, carry = state
            head = self.head + member
            at = self.of_batch(ids.shape[0]), self.of_head(head, ids.shape[1]), row

            def one(n: Any, carry: Any, *, ruled: bool) -> Any:
                return visit(Piece(self, head, at, n, before + n), carry, ruled=ruled)

            free, all_ = full[at] * pieces, count[at] * pieces
            carry = lax.fori_loop(0, free, functools.partial(one, ruled=False), carry)
            carry = lax.fori_loop(free, all_, functools.partial(one, ruled=True), carry)
            return before + all_, carry

        state = jnp.int32(0), carry
        if plan.members == 1:
            return one_head(jnp.int32(0), state)[1]
        return lax.fori_loop(0, plan.members, one_head, state)[1]

    def store(self, *results: tuple[str, Any, jax.Array]) -> None:
        """Send results (name, tile to go through, value) to device memory."""
        for _, through, value in results:
            put(through, value)
        start = self.row * self.plan.own + self.group * ROWS
        for name, through, _ in results:
            plgpu.copy_smem_to_gmem(through, self.part(name, self.head, start, ROWS))
        plgpu.wait_smem_to_gmem(0)  # shared memory dies with the program


@dataclass(frozen=True)
class Piece:
    """One walked tile."""

    program: Program
    head: Any  # query head
    at: Any  # which list
    n: Any  # which tile of the list
    turn: Any  # which tile of the program

    @property
    def slot(self) -> Any:
        """Place in the ring."""
        return lax.rem(self.turn, jnp.int32(self.program.plan.slots))

    @property
    def start(self) -> Any:
        """First position."""
        plan = self.program.plan
        pieces = plan.step_block // plan.step
        block = self.program.refs["ids"][(*self.at, _over(self.n, pieces))]
        place = lax.rem(self.n, jnp.int32(pieces))
        return block * plan.step_block + place * plan.step

    @contextlib.contextmanager
    def fed(self, *names: str) -> Iterator[Any]:
        """Wait for the tiles of one stream; leaving gives them back."""
        tiles, slot = self.program.tiles, self.slot
        plgpu.barrier_wait(tiles["ready_" + names[0]].at[slot])
        yield [tiles[name].at[slot] for name in names]
        plgpu.barrier_arrive(tiles["free_" + names[0]].at[slot])

    def feed(self, names: tuple[str, ...]) -> None:
        """Copy the tiles of one stream into their slot, once it is free."""
        program, slot = self.program, self.slot
        ready, free = (program.tiles[kind + names[0]] for kind in ("ready_", "free_"))
        refill = self.turn >= program.plan.slots
        pl.when(refill)(lambda: plgpu.barrier_wait(free.at[slot]))
        for name in names:
            source = program.part(name, self.head, self.start, program.plan.step)
            plgpu.copy_gmem_to_smem(
                source, program.tiles[name].at[slot], ready.at[slot]
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


def launch(
    body: Callable[[Program], None],
    *,
    plan: Plan,
    grid: tuple[int, int, int],
    lists: Lists,
    traffic: Traffic,
) -> Any:
    """Run ``body`` in the compute warpgroups of a grid of programs.

    Args:
        body: what a warpgroup does once its own tiles have come.
        plan: static sizes.
        grid: own tiles, batch elements, heads of the own arrays.
        lists: what each own tile walks.
        traffic: arrays by name.

    Raises:
        ValueError: if tiles do not divide blocks or do not fit shared memory.
    """
    _check(plan)
    plan, scratch = _scratch(plan, traffic)
    groups = plan.own // ROWS
    names = [*Lists._fields, *traffic.arrays, *traffic.outputs]

    def kernel(*refs: Any, **tiles: Any) -> None:
        # Long causal lists are the last rows: start them first, all heads together.
        row = grid[0] - 1 - lax.axis_index("row")
        group = lax.axis_index("group")
        program = Program(
            plan=plan,
            refs=dict(zip(names, refs, strict=True)),
            tiles=tiles,
            batch=lax.axis_index("batch"),
            head=lax.axis_index("head") * plan.members,
            row=row,
            group=group,
        )

        @pl.when(group < groups)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[groups][0], action="increase")
            arrived = tiles["own"].at[group]
            for name in traffic.own:
                source = program.part(name, program.head, program.start, ROWS)
                plgpu.copy_gmem_to_smem(source, program.own(name), arrived)
            plgpu.barrier_wait(arrived)
            body(program)

        @pl.when(group == groups)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")

            def feed(piece: Piece, carry: None, *, ruled: bool) -> None:  # noqa: ARG001
                for stream in traffic.streams:
                    piece.feed(stream)

            program.walk(feed, None)

    found = plgpu.kernel(
        kernel,
        out_type=tuple(traffic.outputs.values()),
        grid=grid,
        grid_names=("row", "batch", "head"),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*lists, *traffic.arrays.values())
    return dict(zip(traffic.outputs, found, strict=True))
