"""What the frame of the kernels promises: no race, no deadlock, a budget that holds."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import check, forward, interpreted, skeleton
from pallas_kernels.gpu.cases import CASES, Case, arrays, kernels, lists
from tests.interpreters import DEADLINE, gpu_interpreted

pytestmark = DEADLINE
TINY = Case(length=256, heads=1, key_heads=1, width=32, block_q=64, block_kv=64)


def run(kernel, key):
    x = arrays(TINY, key)
    row = jnp.zeros((1, 1, TINY.length))
    x |= {"lse": row, "delta": row}
    part = kernels(TINY)[kernel]
    # Fewer slots than pieces and programs than tiles: both are used again.
    plan = dataclasses.replace(part.keywords["plan"], slots=2, programs=3)
    walked = lists(TINY, by_keys=kernel == "key_gradients")
    with interpreted():
        return jax.block_until_ready(
            jax.jit(part, static_argnames="plan")(x, walked, plan=plan)
        )


@pytest.mark.few(1)
@gpu_interpreted
@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradients"])
def test_a_slot_given_back_too_early_is_found(kernel, key, monkeypatch):
    run(kernel, key)

    wait, free = skeleton.Piece.wait, skeleton.Piece.free

    def hasty(piece, *names):
        tiles = wait(piece, *names)
        free(piece, *names)
        return tiles

    monkeypatch.setattr(skeleton.Piece, "wait", hasty)
    for name in ("free", "free_last"):
        monkeypatch.setattr(skeleton.Piece, name, lambda piece, *names: None)
    with pytest.raises(Exception, match=r"(?i)race"):
        run(kernel, key)


@gpu_interpreted
def test_a_tile_read_before_it_came_is_found(key, monkeypatch):
    def blind(piece, *names):
        return [piece.own.tiles[name].at[piece.slot] for name in names]

    monkeypatch.setattr(skeleton.Piece, "wait", blind)
    with pytest.raises(Exception, match=r"(?i)race|phase|barrier"):
        run("forward", key)


@pytest.mark.slow  # all that it calls is tested above
@gpu_interpreted
def test_the_check_for_a_device_runs_in_the_interpreter(capsys):
    check.main(["--tiny"])
    assert "tiny {'out': " in capsys.readouterr().out


@gpu_interpreted
def test_warpgroups_that_work_in_turns_change_nothing(key):
    case = Case(length=256, heads=1, key_heads=1, width=32)
    x, walked = arrays(case, key), lists(case)
    walked = walked._replace(count=walked.count.at[0, 0, 0].set(0))
    each = [kernels(dataclasses.replace(case, in_turns=on)) for on in (False, True)]
    with interpreted():
        alone, turned = (jax.jit(k["forward"])(x, walked) for k in each)
    assert (alone["out"] == turned["out"]).all()
    assert (alone["lse"] == turned["lse"]).all()


@pytest.mark.slow
@gpu_interpreted
def test_all_extras_of_the_cases_agree_with_dense_attention():
    small = {"length": 128, "heads": 2, "key_heads": 1, "width": 32}
    case = dataclasses.replace(CASES["extras"], **small, block_q=64, block_kv=64)
    with interpreted():
        assert max(check.errors(case).values()) < check.BOUNDS["bfloat16"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"own": 96}, "own=96: must be a multiple of 64 and divide 128"),
        ({"step": 64, "step_block": 96}, "step=64: .* divide 96"),
        ({"own": 192, "own_block": 192}, "own=192: registers suffice"),
        ({"slots": 9}, "in 9 slots need .* use smaller tiles or fewer slots"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_launch(change, words, key):
    run = kernels(Case(length=384))["forward"]
    plan = dataclasses.replace(run.keywords["plan"], **change)
    rest = {n: run.keywords[n] for n in ("score", "rule")}
    x = {n: jnp.zeros((1, 384, 16, 128), "bfloat16") for n in "qkv"}
    with pytest.raises(ValueError, match=words):
        forward(x, lists(Case(length=384)), plan=plan, **rest)


def test_a_jax_without_an_interpreter_says_so(monkeypatch):
    monkeypatch.delattr(plgpu, "force_gpu_interpret_mode", raising=False)
    with (
        pytest.raises(ValueError, match="cannot interpret GPU kernels: use"),
        interpreted(),
    ):
        pass
