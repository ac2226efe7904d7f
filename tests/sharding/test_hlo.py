import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax.sharding.hlo import collective_bytes
from sparsejax.sharding.mesh import MeshConfig, make_mesh


def program(rounds):
    """All-gathers 4 floats over 2 devices, ``rounds`` times in a loop, then sums 8."""

    def piece(x):
        def body(total, _):
            whole = jax.lax.all_gather(x + total.sum(), "tensor", tiled=True)
            return total + whole.reshape(2, -1).sum(0), None

        total = jax.lax.scan(body, x, None, length=rounds)[0]
        return jax.lax.psum(total, "data")

    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:4])
    spec = P(("data", "tensor"))
    run = jax.shard_map(
        piece, mesh=mesh, in_specs=spec, out_specs=P("tensor"), check_vma=False
    )
    return jax.jit(run).lower(jnp.ones(16)).compile().as_text()


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
    moved = collective_bytes(program(rounds=7))
    assert moved["all-gather"] == 7 * 8 * 4
    assert moved["all-reduce"] == 4 * 4


def test_a_program_without_collectives_moves_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert collective_bytes(text) == {}


def ragged_program(rows, room):
    """Sends ``rows`` rows of 4 floats into ``room`` rows, lowered for TPUs."""

    def piece(x, sizes):
        place = jnp.zeros((room, 4))
        return jax.lax.ragged_all_to_all(x, place, *[sizes] * 4, axis_name="expert")

    mesh = make_mesh(MeshConfig(expert=2), jax.devices()[:2])
    run = jax.shard_map(
        piece, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    shapes = jax.ShapeDtypeStruct((2 * rows, 4), "float32"), jnp.ones(4, jnp.int32)
    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowered.as_text(dialect="hlo")


@pytest.mark.parametrize(("rows", "room"), [(3, 24), (24, 3)])
def test_a_ragged_collective_moves_its_rows_and_not_the_room_for_more(rows, room):
    assert collective_bytes(ragged_program(rows, room)) == {
        "ragged-all-to-all": 3 * 4 * 4
    }


def test_a_started_ragged_collective_counts_the_smaller_of_its_two_ends():
    text = """ENTRY %main (x: f32[8]) -> f32[8] {
  %go = ((bf16[64,8]{1,0:T(8,128)}, bf16[16,8]), bf16[16,8], u32[])\
 ragged-all-to-all-start(%x, %y), channel_id=1
  %end = bf16[16,8] ragged-all-to-all-done(%go)
}"""
    assert collective_bytes(text) == {"ragged-all-to-all": 16 * 8 * 2}


# As TPUs write it: a loop's bound is in its condition alone, and a gather that runs
# beside other work stands in each of its parts, in one chain.
IN_PARTS = """HloModule m
%start (p: bf16[4]) -> bf16[16] {
  ROOT %a = bf16[16] all-gather(%p), {chain_id="7"}, metadata={op_name="exchange/g"}
}
%rest (p: bf16[4]) -> bf16[16] {
  ROOT %b = bf16[16] all-gather(%p), {chain_id="7"}, metadata={op_name="exchange/g"}
}
%inner (s: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %x = bf16[16] fusion(%p), kind=kCustom, calls=%start
  %y = bf16[16] fusion(%x), kind=kCustom, calls=%rest
  %z = f32[8] all-reduce(%q), channel_id=8, to_apply=%add
}
%bound (s: (s32[], bf16[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %l = pred[] compare(%i, %c), direction=LT
}
%outer (s: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %w = (s32[], bf16[4]) while(%s), condition=%bound, body=%inner
}
ENTRY %main (p: bf16[4]) -> bf16[4] {
  %w = (s32[], bf16[4]) while(%t), condition=%bound.2, body=%outer,\
 backend_config={"known_trip_count":{"n":"3"}}
}"""


def test_loops_in_loops_multiply_and_the_parts_of_a_collective_are_one():
    assert collective_bytes(IN_PARTS) == {
        "all-gather": 3 * 5 * 32,
        "all-reduce": 3 * 5 * 32,
    }


BRANCHES = [
    "branch_computations={%none, %start, %rest}",
    "true_computation=%start, false_computation=%none",
]


@pytest.mark.parametrize("branches", BRANCHES)
def test_of_a_conditional_the_branch_that_moves_most_counts(branches):
    text = f"""%none (p: bf16[4]) -> bf16[16] {{
  ROOT %n = bf16[16] broadcast(%p)
}}
%start (p: bf16[4]) -> bf16[16] {{
  ROOT %a = bf16[16] all-gather(%p), channel_id=1
}}
%rest (p: bf16[4]) -> bf16[16] {{
  ROOT %b = bf16[8] all-reduce(%p), channel_id=2, to_apply=%add
}}
ENTRY %main (p: bf16[4]) -> bf16[16] {{
  %c = bf16[16] conditional(%i, %p, %p, %p), {branches}, metadata={{op_name="cond"}}
}}"""
    assert collective_bytes(text) == {"all-gather": 16 * 2}


def test_a_scope_counts_what_was_traced_in_it():
    assert collective_bytes(IN_PARTS, "exchange") == {"all-gather": 3 * 5 * 32}


@pytest.mark.parametrize(
    ("kind", "result", "moved"),
    [
        ("all-gather", "((bf16[4], f32[2]), (bf16[16], f32[8]))", 16 * 2 + 8 * 4),
        ("all-reduce", "(bf16[16], f32[8])", 16 * 2 + 8 * 4),
        ("collective-permute", "(bf16[16], bf16[16], u32[], u32[])", 16 * 2),
    ],
)
def test_a_start_of_several_counts_each_result_and_no_operand(kind, result, moved):
    text = f"""ENTRY %main (x: bf16[4]) -> bf16[4] {{
  %go = {result} {kind}-start(%x, %y), channel_id=1
}}"""
    assert collective_bytes(text) == {kind: moved}
