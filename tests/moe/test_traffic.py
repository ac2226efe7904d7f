"""Traffic: the formula is what compiled programs move."""

import functools
import math
import re

import jax
import pytest

from sparsejax.moe import ragged
from sparsejax.moe.capacity import rows_of
from sparsejax.moe.config import MoEConfig
from sparsejax.moe.exchange import EXCHANGES
from sparsejax.moe.traffic import COUNTS, exchange_bytes, traffic_of
from sparsejax.sharding.hlo import collective_bytes
from tests.moe.exchange_programs import (
    MESHES,
    TOKENS,
    WIDTH,
    K,
    mesh_of,
    problem,
    program,
    routed,
)

DEVICES = 4
SHAPE = {"tokens": TOKENS // 8, "per_token": K, "width": WIDTH, "devices": DEVICES}


def operands():
    x, _, experts = problem()
    return x, routed("top_k_softmax"), experts


@functools.cache
def compiled_bytes(exchange, **settings):
    run = program(exchange, MESHES[DEVICES], **settings).run
    with jax.set_mesh(mesh_of(MESHES[DEVICES])):
        return collective_bytes(run.lower(*operands()).compile().as_text())


def total(traffic, kind):
    return sum(part.get(kind, 0) for part in (traffic.forward, traffic.backward))


def test_there_is_a_count_for_every_exchange():
    assert set(COUNTS) == set(EXCHANGES)
    with pytest.raises(ValueError, match=r"exchange='rung'.*did you mean 'ring'"):
        exchange_bytes("rung", **SHAPE)


def test_all_to_all_moves_its_buffers_and_nothing_else():
    rows = rows_of(slots=SHAPE["tokens"] * K, targets=DEVICES, factor=1.25)
    found = compiled_bytes("all_to_all", exchange_factor=1.25)
    counted = exchange_bytes("all_to_all", rows=rows, **SHAPE)
    assert found["all-to-all"] == total(counted, "all-to-all")


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_ring_moves_all_tokens_and_their_sums(kind):
    counted = total(exchange_bytes("ring", **SHAPE), kind)
    assert compiled_bytes("ring")[kind] == counted


def sent_bytes(text):
    """Bytes of the smaller end of each ragged collective: the rows, not the room."""
    array = r"tensor<([\dx]+)x[fi]32>"
    calls = re.findall(rf"@ragged_all_to_all.*: \({array}, {array},", text)
    sizes = [[math.prod(map(int, a.split("x"))) for a in call] for call in calls]
    return sum(4 * min(size) for size in sizes)


def test_ragged_all_to_all_moves_each_row_once(monkeypatch):
    """Lowered for TPUs, whose collective has room for all rows but moves only some."""
    monkeypatch.setattr(ragged, "platform", lambda: "tpu")
    run = program.__wrapped__("ragged_all_to_all", MESHES[DEVICES]).run
    with jax.set_mesh(mesh_of(MESHES[DEVICES])):
        lowered = run.trace(*operands()).lower(lowering_platforms=("tpu",))
    counted = exchange_bytes("ragged_all_to_all", **SHAPE)
    assert sent_bytes(lowered.as_text()) == total(counted, "ragged-all-to-all")


def test_a_step_counts_its_rounds_and_what_is_computed_again():
    layer = {"experts": 8, "per_token": K, "hidden": 6, "exchange": "ring"}
    step = {"tokens": 16, "width": WIDTH, "devices": DEVICES, "dtype": "float32"}
    once = traffic_of(MoEConfig(**layer), **step, remat=False)
    again = traffic_of(MoEConfig(**layer, hops=2), **step, remat=True)
    parts = exchange_bytes("ring", **SHAPE | {"tokens": 16})
    gathered, summed = (total(parts, k) for k in ("all-gather", "reduce-scatter"))
    assert once == {"all-gather": gathered, "reduce-scatter": summed}
    gathered += parts.forward["all-gather"]
    assert again == {"all-gather": 2 * gathered, "reduce-scatter": 2 * summed}
    alone = traffic_of(MoEConfig(**layer), **step | {"devices": 1}, remat=False)
    assert alone == {}


def test_a_router_that_leaves_the_number_open_sends_a_slot_for_every_expert():
    layer = {"experts": 8, "per_token": K, "hidden": 6, "exchange": "ring"}
    step = {"tokens": 16, "width": WIDTH, "devices": DEVICES, "dtype": "float32"}
    counted = traffic_of(MoEConfig(**layer, router="remoe"), **step, remat=False)
    parts = exchange_bytes("ring", **SHAPE | {"tokens": 16, "per_token": 8})
    assert counted["all-gather"] == total(parts, "all-gather")
