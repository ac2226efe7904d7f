import jax
import jax.numpy as jnp
import pytest

from sparsejax import tree
from sparsejax.config import ConfigError
from sparsejax.train.checkpoint import CheckpointError, Checkpoints
from tests.train.run_state import (
    CONFIG,
    Mask,
    abstract,
    assert_equal,
    bits,
    build,
    mesh_of,
    save,
    state_at,
)


@pytest.fixture
def reports():
    return []


@pytest.fixture
def checkpoints(tmp_path, reports):
    opened = Checkpoints(tmp_path / "run", keep=3, report=reports.append)
    yield opened
    opened.close()


@pytest.mark.parametrize(("before", "after"), [(4, 4), (8, 4), (8, 1), (1, 8)])
def test_a_state_comes_back_on_any_mesh(checkpoints, before, after):
    save(checkpoints, 5, mesh=mesh_of(before))
    target = abstract(mesh_of(after))
    restored = checkpoints.restore(target)
    assert restored.step == 5
    assert restored.data == {"next_index": 5, "files": ["a", "b"]}
    assert restored.config == CONFIG
    assert_equal(restored.state, build(5))
    for x, wanted in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True
    ):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)


def test_a_state_comes_back_without_shardings(checkpoints):
    save(checkpoints, 5)
    restored = checkpoints.restore(jax.eval_shape(lambda: build(0)))
    assert_equal(restored.state, build(5))


@pytest.mark.parametrize("devices", [1, 4])
def test_a_part_of_a_state_comes_back(checkpoints, devices):
    save(checkpoints, 3)
    given, saved = abstract(mesh_of(devices)), state_at(3, mesh_of(devices))
    only = {"params/w", "empty", "opt/0/mu/w"}
    state = checkpoints.restore(given, only=only).state
    for path, x in tree.leaves(state).items():
        if path in only:
            assert bits(x) == bits(tree.leaves(saved)[path])
            assert x.sharding == tree.leaves(given)[path].sharding
        else:
            assert isinstance(x, jax.ShapeDtypeStruct)


def test_variables_keep_their_metadata(checkpoints):
    save(checkpoints, 5)
    state = checkpoints.restore(abstract(mesh_of(4))).state
    assert tree.axes_of(state["params"]) == {"w": "m d", "layers/0/b": "d"}
    assert isinstance(state["masks"]["w"], Mask)


def test_arrays_may_be_donated_straight_after_a_save(checkpoints):
    mesh = mesh_of(8)
    state = {
        "w": jax.device_put(
            jnp.ones((256, 1024)), jax.NamedSharding(mesh, jax.P("data"))
        )
    }
    double = jax.jit(lambda s: {"w": s["w"] * 2.0}, donate_argnums=0)
    for step in range(4):
        before = state
        checkpoints.save(step, state, data={}, config={})
        state = double(state)
        before["w"].delete()  # whether it was donated or not
    checkpoints.wait()
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    for step in checkpoints.steps():
        values = checkpoints.restore(target, step=step).state["w"]
        assert float(values.min()) == float(values.max()) == 2.0**step


def test_nothing_saved_is_none(checkpoints):
    assert checkpoints.restore(abstract(mesh_of(1))) is None
    assert checkpoints.latest() is None
    assert checkpoints.steps() == []


def test_a_blocking_save_is_on_disk_when_it_returns(checkpoints):
    checkpoints.save(3, build(3), data={}, config={}, blocking=True)
    assert checkpoints.latest() == 3


def test_saving_a_step_again_changes_nothing(checkpoints):
    save(checkpoints, 5)
    checkpoints.save(5, build(6), data={}, config={})
    assert_equal(checkpoints.restore(abstract(mesh_of(1))).state, build(5))


def test_a_named_step_is_restored(checkpoints):
    save(checkpoints, 1, 2, 3)
    assert_equal(checkpoints.restore(abstract(mesh_of(1)), step=2).state, build(2))


def test_a_named_step_that_is_not_there_is_an_error(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*2: no manifest"):
        checkpoints.restore(abstract(mesh_of(1)), step=2)


@pytest.mark.parametrize(
    ("keep", "keep_best", "losses", "left"),
    [
        (1, 0, [1.0, 2.0, 3.0, 4.0, 5.0], [5]),
        (2, 0, [5.0, 1.0, 4.0, 2.0, 3.0], [4, 5]),
        (2, 1, [5.0, 1.0, 4.0, 2.0, 3.0], [2, 4, 5]),
        (1, 2, [5.0, 1.0, 4.0, 2.0, 3.0], [2, 4, 5]),
        (2, 2, [1.0, 2.0, 3.0, 2.0, 1.0], [1, 4, 5]),
        (1, 1, [None, 3.0, None, float("nan"), None], [2, 5]),
        (9, 9, [1.0, 2.0, 3.0, 4.0, 5.0], [1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, keep_best, losses, left):
    checkpoints = Checkpoints(tmp_path, keep=keep, keep_best=keep_best)
    for step, loss in enumerate(losses, start=1):
        checkpoints.save(step, {"x": jnp.ones(2)}, data={}, config={}, loss=loss)
    checkpoints.close()
    assert checkpoints.steps() == left


def test_the_best_is_remembered_by_the_next_process(tmp_path):
    first = Checkpoints(tmp_path, keep=1, keep_best=1)
    first.save(1, {"x": jnp.ones(2)}, data={}, config={}, loss=0.5)
    first.close()
    second = Checkpoints(tmp_path, keep=1, keep_best=1)
    for step in (2, 3):
        second.save(step, {"x": jnp.ones(2)}, data={}, config={}, loss=0.6)
    second.close()
    assert second.steps() == [1, 3]


def test_a_save_behind_a_whole_checkpoint_is_refused(checkpoints):
    save(checkpoints, 10)
    with pytest.raises(CheckpointError, match=r"cannot save step 5: .*/10 is already"):
        checkpoints.save(5, build(5), data={}, config={})


def test_a_checkpoint_of_another_model_is_one_line(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(ConfigError) as error:
        checkpoints.restore(abstract(mesh_of(4), width=16))
    message = str(error.value)
    assert "is of another model" in message
    assert "params/w is float32[16,8], not float32[16,16]" in message
    assert "\n" not in message
    assert len(message) < 600


def test_dtypes_are_never_cast(checkpoints):
    save(checkpoints, 1)
    target = abstract(mesh_of(4))
    cast = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
    target["params"]["w"] = target["params"]["w"].replace(cast)
    with pytest.raises(ConfigError, match=r"params/w is float32\[16,8\], not bfloat16"):
        checkpoints.restore(target)


def test_a_key_of_another_kind_is_refused(checkpoints):
    save(checkpoints, 1)
    target = abstract(mesh_of(4)) | {"key": jax.random.key(0, impl="rbg")}
    with pytest.raises(ConfigError, match=r"key is key<fry>\[\], not key<rbg>\[\]"):
        checkpoints.restore(target)


def test_absent_and_additional_paths_are_named_and_the_list_is_cut(checkpoints):
    save(checkpoints, 1)
    more = {f"more{i}": jnp.ones(1) for i in range(9)}
    target = {k: v for k, v in abstract(mesh_of(4)).items() if k != "key"} | more
    with pytest.raises(ConfigError, match=r"key is key<fry>\[\], not absent") as error:
        checkpoints.restore(target)
    assert "more0 is absent, not float32[1]" in str(error.value)
    assert "and 2 more" in str(error.value)


def test_two_arrays_of_one_path_are_refused(checkpoints):
    state = {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}
    with pytest.raises(ValueError, match="'a/b' is the path of two arrays"):
        checkpoints.save(1, state, data={}, config={})


def test_data_that_json_cannot_hold_is_refused(checkpoints):
    with pytest.raises(ValueError, match="JSON"):
        checkpoints.save(1, {"x": jnp.ones(1)}, data={"x": float("nan")}, config={})


def test_integer_keys_of_the_data_do_not_break_the_seal(checkpoints):
    data = {"files": {10: "a", 9: "b"}}
    checkpoints.save(1, {"x": jnp.ones(1)}, data=data, config={}, blocking=True)
    restored = checkpoints.restore({"x": jnp.ones(1)})
    assert restored.data == {"files": {"10": "a", "9": "b"}}


@pytest.mark.parametrize(("keep", "keep_best"), [(0, 1), (1, -1)])
def test_the_newest_is_always_kept(tmp_path, keep, keep_best):
    with pytest.raises(ConfigError, match="keep must be positive"):
        Checkpoints(tmp_path, keep=keep, keep_best=keep_best)


def test_a_folder_under_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot write .*/file/run: NotADirectory"
    ):
        Checkpoints(tmp_path / "file" / "run", keep=1)


def test_a_file_in_the_place_of_the_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*/file: FileExists"):
        Checkpoints(tmp_path / "file", keep=1)


@pytest.mark.parametrize("next_call", ["wait", "save", "close"])
def test_a_save_that_fails_in_the_background_comes_out_at_the_next_call(
    checkpoints, monkeypatch, capfd, next_call
):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoints.directory), "rename", full)
        checkpoints.save(2, {"x": jnp.ones(3)}, data={}, config={})
        arguments = (3, {"x": jnp.ones(3)}) if next_call == "save" else ()
        options = {"data": {}, "config": {}} if next_call == "save" else {}
        with pytest.raises(
            CheckpointError, match=r"cannot write .*/run/2: OSError: .*No"
        ):
            getattr(checkpoints, next_call)(*arguments, **options)
    assert checkpoints.steps() == []
    assert capfd.readouterr().err == ""


def test_a_full_disk_in_the_manifest_is_one_clear_error(checkpoints, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(checkpoints._orbax), "save", full)
    with pytest.raises(CheckpointError, match=r"/run/4: OSError: .*No space left"):
        checkpoints.save(4, build(4), data={}, config={})


def test_orbax_says_nothing(checkpoints, capfd, caplog):
    save(checkpoints, 1, 2)
    checkpoints.restore(abstract(mesh_of(4)))
    assert capfd.readouterr().err == ""
    assert [r for r in caplog.records if "orbax" in r.pathname] == []


def test_a_read_only_folder_is_not_touched(tmp_path):
    checkpoints = Checkpoints(tmp_path / "absent", keep=1, read_only=True)
    assert checkpoints.restore(abstract(mesh_of(1))) is None
    with pytest.raises(CheckpointError, match="save step 1: opened as read_only"):
        checkpoints.save(1, build(1), data={}, config={})
    checkpoints.close()
    assert not (tmp_path / "absent").exists()


def test_a_save_that_fails_at_once_is_not_taken_for_done(checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoints._orbax), "save", lambda *_, **__: 1 / 0)
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            checkpoints.save(4, build(4), data={}, config={})
    save(checkpoints, 4)
    assert checkpoints.steps() == [4]
