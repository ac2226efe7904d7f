import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import tree
from sparsejax.config import ConfigError
from sparsejax.train.checkpoint import CheckpointError, Checkpoints

CONFIG = {"model": {"width": 8}, "name": "é"}


class Mask(nnx.Variable):
    pass


def mesh_of(devices):
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def build(step, width=8):
    """A state like that of a run: parameters, masks, moments, keys and counts."""
    key = jax.random.fold_in(jax.random.key(7), step)
    w = jax.random.normal(key, (16, width))
    params = nnx.State(
        {
            "w": nnx.Param(w, axes="m d"),
            "layers": [{"b": nnx.Param(w[0].astype(jnp.bfloat16), axes="d")}],
        }
    )
    return {
        "step": jnp.asarray(step, jnp.int32),
        "params": params,
        "masks": nnx.State({"w": Mask(w > 0, axes="m d")}),
        "opt": optax.adam(0.1).init(params),
        "table": jax.random.normal(key, (64, 64)),  # too big to be stored inline
        "key": key,
        "keys": jax.random.split(key, 8),
        "empty": jnp.zeros((0, 3)),
    }


def shardings(state, mesh):
    """Cut every leading axis of 16 or 8 over the mesh, and keep the rest whole."""

    def one(x):
        cut = x.ndim > 0 and x.shape[0] in (8, 16)
        return jax.NamedSharding(mesh, jax.P("data") if cut else jax.P())

    return jax.tree.map(one, state)


def abstract(mesh, **fields):
    state = jax.eval_shape(lambda: build(0, **fields))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )


def state_at(step, mesh):
    state = build(step)
    return jax.device_put(state, shardings(state, mesh))


def bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def assert_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for path, x in tree.leaves(one).items():
        y = tree.leaves(two)[path]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert bits(x) == bits(y), path


@pytest.fixture
def reports():
    return []


@pytest.fixture
def checkpoints(tmp_path, reports):
    opened = Checkpoints(tmp_path / "run", keep=3, report=reports.append)
    yield opened
    opened.close()


def save(checkpoints, *steps, mesh=None, losses=(), **options):
    for index, step in enumerate(steps):
        checkpoints.save(
            step,
            state_at(step, mesh or mesh_of(4)),
            data={"next_index": step, "files": ["a", "b"]},
            config=CONFIG,
            loss=losses[index] if losses else None,
            **options,
        )
    checkpoints.wait()


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


def files(directory):
    return sorted(p for p in Path(directory).rglob("*") if p.is_file())


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def data_file(directory):
    return max(files(directory / "arrays"), key=lambda p: p.stat().st_size)


def test_a_flipped_bit_anywhere_is_caught_or_harmless(checkpoints, reports):
    save(checkpoints, 1, 2)
    whole = Path(checkpoints.directory / "2")
    copy = checkpoints.directory.parent / "copy"
    shutil.copytree(whole, copy)
    draw = random.Random(3)
    targets = [p for p in files(whole) if p.stat().st_size]
    caught = 0
    for turn in range(24):
        path = targets[turn % len(targets)] if turn < 16 else data_file(whole)
        flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
        reports.clear()
        restored = checkpoints.restore(abstract(mesh_of(4)))
        assert_equal(restored.state, build(restored.step))
        assert restored.data["next_index"] == restored.step
        assert restored.config == CONFIG
        assert len(reports) == (restored.step == 1)
        caught += len(reports)
        shutil.rmtree(whole)
        shutil.copytree(copy, whole)
    assert caught >= 8


@pytest.mark.parametrize("name", ["float", "bfloat", "mask", "count", "key"])
def test_a_changed_number_is_caught_whatever_its_kind(tmp_path, reports, name):
    """Write a checkpoint of changed numbers, then give it the old one's manifest."""
    values = {
        "float": jnp.ones(4),
        "bfloat": jnp.ones(4, jnp.bfloat16),
        "mask": jnp.ones(4, bool),
        "count": jnp.ones((), jnp.int32),
        "key": jax.random.key(1),
    }
    flipped = {
        "float": jnp.ones(4).at[2].multiply(-1.0),
        "bfloat": jnp.array([1, 1.0078125, 1, 1], jnp.bfloat16),
        "mask": jnp.array([True, True, False, True]),
        "count": jnp.int32(2),
        "key": jax.random.key(2),
    }
    good = Checkpoints(tmp_path / "good", keep=1)
    good.save(1, values, data={}, config={}, blocking=True)
    bad = Checkpoints(tmp_path / "bad", keep=1, report=reports.append)
    changed = {**values, name: flipped[name]}
    bad.save(1, changed, data={}, config={}, blocking=True)
    manifest = Path("1", "manifest", "metadata")
    shutil.copy(tmp_path / "good" / manifest, tmp_path / "bad" / manifest)
    with pytest.raises(CheckpointError, match=f"the numbers of {name} were changed"):
        bad.restore(values)
    good.close()
    bad.close()


def remove(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [remove, truncate, empty])
@pytest.mark.parametrize("name", ["manifest/metadata", "arrays/manifest.ocdbt", "data"])
def test_a_short_or_missing_file_falls_back(checkpoints, reports, capfd, harm, name):
    save(checkpoints, 1, 2)
    newest = Path(checkpoints.directory / "2")
    harm(data_file(newest) if name == "data" else newest / name)
    restored = checkpoints.restore(abstract(mesh_of(4)))
    assert restored.step == 1
    assert_equal(restored.state, build(1))
    assert len(reports) == 1
    assert f"checkpoint {newest} is damaged (" in reports[0]
    assert "taking the next older one" in reports[0]
    assert "\n" not in reports[0]
    assert len(capfd.readouterr().err.splitlines()) == 0


def test_a_manifest_with_an_old_seal_is_refused(checkpoints, reports):
    save(checkpoints, 1, 2)
    path = Path(checkpoints.directory / "2" / "manifest" / "metadata")
    document = json.loads(path.read_text())
    document["body"]["data"]["next_index"] = 3
    path.write_text(json.dumps(document))
    assert checkpoints.restore(abstract(mesh_of(4))).step == 1
    assert "the manifest was changed" in reports[0]


def test_a_renamed_checkpoint_is_refused(checkpoints, reports):
    save(checkpoints, 1, 2)
    Path(checkpoints.directory / "2").rename(checkpoints.directory / "9")
    assert checkpoints.restore(abstract(mesh_of(4))).step == 1
    assert "the manifest is that of step 2" in reports[0]


def test_an_uncommitted_folder_is_no_checkpoint(checkpoints):
    save(checkpoints, 1, 2)
    newest = Path(checkpoints.directory / "2")
    newest.rename(newest.with_name("2.orbax-checkpoint-tmp"))
    (checkpoints.directory / "notes").mkdir()
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(abstract(mesh_of(4))).step == 1


def test_no_whole_checkpoint_is_an_error_that_names_all_reasons(checkpoints, reports):
    save(checkpoints, 1, 2)
    for step in ("1", "2"):
        (checkpoints.directory / step / "manifest" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*2: no.*1: no"):
        checkpoints.restore(abstract(mesh_of(4)))


def test_a_run_that_fell_back_replaces_the_damaged_checkpoint(tmp_path):
    first = Checkpoints(tmp_path, keep=3)
    save(first, 10, 15, losses=[1.0, 0.1])
    first.close()
    flip(data_file(tmp_path / "15"), 40, 3)
    (tmp_path / "15" / "manifest" / "metadata").unlink()
    second = Checkpoints(tmp_path, keep=3, report=lambda _: None)
    assert second.restore(abstract(mesh_of(4))).step == 10
    save(second, 12, 15)
    assert second.steps() == [10, 12, 15]
    assert_equal(second.restore(abstract(mesh_of(4))).state, build(15))
    second.close()


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(small_disk):
    checkpoints = Checkpoints(small_disk / "run", keep=2)
    save(checkpoints, 1)
    noise = jax.random.normal(jax.random.key(0), (1 << 19,))
    with pytest.raises(CheckpointError, match=r"cannot write .*/run/2: ") as error:
        checkpoints.save(2, {"x": noise}, data={}, config={}, blocking=True)
    assert "space" in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoints.steps() == [1]
    save(checkpoints, 3)  # what was half written has made room
    assert checkpoints.steps() == [1, 3]
    checkpoints.close()


def test_a_full_disk_in_the_manifest_is_one_clear_error(checkpoints, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(checkpoints._orbax), "save", full)
    with pytest.raises(CheckpointError, match=r"/run/4: OSError: .*No space left"):
        checkpoints.save(4, build(4), data={}, config={})


SAVER = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp
from sparsejax.train.checkpoint import Checkpoints

def make(step):
    w = jax.random.normal(jax.random.key(step), (512, 512))
    return {"w": w, "step": jnp.int32(step)}

def run(said):
    reports = []
    checkpoints = Checkpoints(sys.argv[1], keep=2, report=reports.append)
    found = checkpoints.restore(make(0))
    step = 0 if found is None else found.step
    if found is not None:
        whole = bool((found.state["w"] == make(step)["w"]).all())
        assert whole and found.data == {"at": step} and not reports
    os.write(said, f"{step} ".encode())
    while True:
        step += 1
        checkpoints.save(step, make(step), data={"at": step}, config={})

# JAX is imported once; each child starts its own backend, and dies at any moment.
draw = random.Random(11)
read, write = os.pipe()
steps = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        try:
            run(write)
        finally:
            os._exit(1)
    steps.append(int(os.read(read, 16)))
    begun = {str(steps[-1] + n) for n in ((2,) if len(steps) == 1 else (1, 2))}
    while not begun & {name.split(".")[0] for name in os.listdir(sys.argv[1])}:
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(*steps)
"""


def test_a_run_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path)],
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    steps = [int(text) for text in done.stdout.split()]
    assert len(steps) == 6
    assert steps == sorted(steps)
    assert steps[-1] > 0
    checkpoints = Checkpoints(tmp_path, keep=2)
    target = {"w": jnp.zeros((512, 512)), "step": jnp.int32(0)}
    assert checkpoints.restore(target).step >= steps[-1]
    checkpoints.close()


def test_orbax_says_nothing(checkpoints, capfd, caplog):
    save(checkpoints, 1, 2)
    checkpoints.restore(abstract(mesh_of(4)))
    assert capfd.readouterr().err == ""
    assert [r for r in caplog.records if "orbax" in r.pathname] == []
