import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sparsejax.train.checkpoint import CheckpointError, Checkpoints
from tests.train.run_state import (
    CONFIG,
    abstract,
    assert_equal,
    build,
    mesh_of,
    save,
)


@pytest.fixture
def reports():
    return []


@pytest.fixture
def checkpoints(tmp_path, reports):
    opened = Checkpoints(tmp_path / "run", keep=3, report=reports.append)
    yield opened
    opened.close()


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
