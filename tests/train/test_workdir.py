"""What a workdir refuses, what it survives, and what it says."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsejax.config import ConfigError
from sparsejax.train.workdir import (
    DiskError,
    disk_guard,
    format_summary,
    open_workdir,
    write_atomically,
    write_summary,
)

CONFIG = {
    "seed": 0,
    "model": {"depth": 4, "ffn": {"experts": 8, "shape": [1, 2]}},
    "mesh": {"data": 1, "fsdp": 1},
    "train": {"steps": 10, "log_every": 1},
}


def changed(**fields):
    """A copy of CONFIG with dotted fields replaced (dots spelled ``__``)."""
    config = json.loads(json.dumps(CONFIG))
    for name, value in fields.items():
        *sections, leaf = name.split("__")
        here = config
        for section in sections:
            here = here[section]
        here[leaf] = value
    return config


def reopen(path, config=None, **options):
    with open_workdir(path, config or CONFIG, "f" * 12, **options) as workdir:
        return workdir


def test_a_new_workdir_says_what_it_belongs_to(tmp_path):
    workdir = reopen(tmp_path / "runs" / "a")
    card = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    assert workdir.is_new
    assert workdir.path == tmp_path / "runs" / "a"
    assert card["config"] == CONFIG
    assert card["fingerprint"] == "f" * 12
    assert set(card["versions"]) == {"jax", "flax", "python"}
    assert card["device"] == {"kind": "cpu", "count": 8}


def test_a_workdir_opens_again_for_the_same_config(tmp_path):
    reopen(tmp_path)
    assert not reopen(tmp_path).is_new


def began(path):
    """Leave what a run does when it has taken a step."""
    (path / "metrics.jsonl").write_text("{}")


def test_tuples_and_lists_are_the_same_config(tmp_path):
    reopen(tmp_path)
    reopen(tmp_path, changed(model__ffn__shape=(1, 2)))


def test_a_config_that_was_refused_before_its_first_step_claims_nothing(tmp_path):
    reopen(tmp_path)
    assert reopen(tmp_path, changed(seed=1)).is_new
    began(tmp_path)
    with pytest.raises(ConfigError, match=r"seed is 1 \(here 0\)"):
        reopen(tmp_path)


def test_another_config_is_refused_by_its_first_differences(tmp_path):
    reopen(tmp_path)
    began(tmp_path)
    other = changed(model__depth=6, model__ffn__experts=2, seed=1, mesh__data=2)
    with pytest.raises(ConfigError) as error:
        reopen(tmp_path, other)
    assert str(error.value) == (
        f"--workdir={tmp_path}: belongs to another config, where config.mesh.data is 1"
        " (here 2), config.model.depth is 4 (here 6), config.model.ffn.experts is 8"
        " (here 2) and 1 more; name another --workdir, or give these fields their"
        " values back"
    )


def test_a_field_on_one_side_only_is_a_difference(tmp_path):
    reopen(tmp_path, {"a": 1, "b": None})
    began(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.b is null \(here absent\);"):
        reopen(tmp_path, {"a": 1})


def test_free_fields_and_sections_may_differ_and_are_kept_up_to_date(tmp_path):
    reopen(tmp_path)
    began(tmp_path)
    free = ("train.log_every", "mesh")
    reopen(tmp_path, changed(train__log_every=7, mesh__fsdp=8), free=free)
    card = json.loads((tmp_path / "config.json").read_text())
    assert card["config"]["train"]["log_every"] == 7
    with pytest.raises(ConfigError, match=r"train\.steps is 10 \(here 20\)"):
        reopen(tmp_path, changed(train__log_every=7, train__steps=20), free=free)


def test_a_free_name_frees_nothing_that_only_starts_alike(tmp_path):
    reopen(tmp_path, {"mesh": 1, "mesh_axes": 1})
    began(tmp_path)
    with pytest.raises(ConfigError, match="mesh_axes"):
        reopen(tmp_path, {"mesh": 1, "mesh_axes": 2}, free=("mesh",))


def test_a_refused_workdir_is_left_as_it_was_and_unlocked(tmp_path):
    reopen(tmp_path)
    began(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError):
        reopen(tmp_path, changed(seed=1))
    assert (tmp_path / "config.json").read_text() == before
    reopen(tmp_path)


@pytest.mark.parametrize("name", ["run", "run/inside"])
def test_a_file_is_not_a_workdir(tmp_path, name):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"it, or a part of it, is a file; name a"):
        reopen(tmp_path / name)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\)"):
        reopen(tmp_path / "run")


def test_results_without_a_config_are_not_taken_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"has metrics\.jsonl but no config\.json"):
        reopen(tmp_path)


def test_a_directory_with_other_files_may_become_a_workdir(tmp_path):
    (tmp_path / "log.txt").write_text("")
    assert reopen(tmp_path).is_new


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not the config of a run"):
        reopen(tmp_path)


def test_two_runs_do_not_write_into_one_workdir(tmp_path):
    with (
        open_workdir(tmp_path, CONFIG, "f"),
        pytest.raises(ConfigError, match=f"writing there .process {os.getpid()} on"),
    ):
        reopen(tmp_path)
    reopen(tmp_path)


def test_a_process_that_does_not_write_needs_no_lock(tmp_path):
    with open_workdir(tmp_path, CONFIG, "f"):
        assert reopen(tmp_path, active=False).path == tmp_path
    assert not reopen(tmp_path / "absent", active=False).path.exists()


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    code = (
        "import sys, time; from sparsejax.train import workdir\n"
        "from pathlib import Path\n"
        "workdir._lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {run.pid} on"):
            reopen(tmp_path)
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    reopen(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_atomically(file, "before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "after")
    assert file.read_text() == "before"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission was denied"),
    ],
)
def test_a_disk_fault_is_one_line_with_path_and_remedy(tmp_path, number, words):
    with pytest.raises(DiskError, match=words) as error, disk_guard(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "start the same command again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_really_full_device_is_named():
    with pytest.raises(DiskError, match="disk is full"), disk_guard("runs"):
        Path("/dev/full").write_text("x")


def test_a_disk_fault_inside_a_library_error_is_found(tmp_path):
    with pytest.raises(DiskError, match="disk is full"), disk_guard(tmp_path):
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")
    with pytest.raises(DiskError, match="read-only"), disk_guard(tmp_path):
        raise RuntimeError("save failed") from OSError(errno.EROFS, "x", "weights")


def test_other_errors_pass_the_disk_guard_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), disk_guard(tmp_path):
        (tmp_path / "absent").read_text()
    with pytest.raises(ConfigError, match="mine"), disk_guard(tmp_path):
        raise ConfigError("mine: No space left on device")


def test_a_summary_is_written_and_readable(tmp_path):
    summary = {
        "eval/loss": 2.87654,
        "finished": True,
        "parameters_total": 12345678,
        "tokens_per_second": 23456.7,
        "useful_flops": 1.5e18,
        "peak_memory_bytes": 3 * 2**30,
        "train_seconds": 3725.0,
        "best": {"step": 900},
        "samples": None,
        "plots": ["a.png", "b.png"],
    }
    write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert format_summary(summary).splitlines() == [
        "eval/loss          2.877",
        "finished           yes",
        "parameters total   12,345,678",
        "tokens per second  23,457",
        "useful flops       1.5 E",
        "peak memory        3 GiB",
        "train              1 h 02 min",
        "best / step        900",
        "samples            none",
        "plots              a.png, b.png",
    ]
