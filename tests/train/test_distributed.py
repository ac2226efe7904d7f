"""Two real processes on this machine meet, exchange, and end well or badly."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax.config import ConfigError
from sparsejax.train.distributed import (
    Process,
    barrier,
    gather_json,
    global_batch,
    initialize,
    together,
)

VARIABLES = ("COORDINATOR", "PROCESSES", "PROCESS_ID", "DISTRIBUTED")

HEAD = """
import json, os, signal, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sparsejax.train import distributed
process = distributed.initialize()
def say(**values):
    print(json.dumps(values), flush=True)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Ended:
    """How a process ended: exit status, lines of both streams."""

    def __init__(self, run):
        out, err = run.communicate(timeout=90)
        self.status = run.returncode
        self.out = [line for line in out.splitlines() if line.startswith("{")]
        self.err = err.splitlines()


def start(code, index, *, port, count=2, **variables):
    environment = os.environ | {
        "SPARSEJAX_COORDINATOR": f"127.0.0.1:{port}",
        "SPARSEJAX_PROCESSES": str(count),
        "SPARSEJAX_PROCESS_ID": str(index),
        "SPARSEJAX_HEARTBEAT_SECONDS": "5",
        "JAX_PLATFORMS": "cpu",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(code)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two(code, **variables):
    port = free_port()
    runs = [start(code, index, port=port, **variables) for index in range(2)]
    try:
        return [Ended(run) for run in runs]
    finally:
        for run in runs:
            run.kill()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(f"SPARSEJAX_{name}", raising=False)


def test_two_processes_exchange_and_part_in_silence():
    ended = run_two("""
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        with jax.set_mesh(mesh), distributed.together(process):
            mine = np.arange(8, dtype=np.int32).reshape(4, 2) + 100 * process.index
            whole = distributed.global_batch((mine, {"x": mine[:, 0]}), rows)
            total = jax.jit(lambda tree: tree[0].sum() + tree[1]["x"].sum())(whole)
            distributed.barrier("before the exchange")
            said = {"from": process.index, "text": "ü" * 100 * process.index}
            everyone = distributed.gather_json(said)
        say(process=process, shape=whole[0].shape, total=int(total), all=everyone)
    """)
    everyone = [{"from": 0, "text": ""}, {"from": 1, "text": "ü" * 100}]
    total = 2 * (28 + 12) + (8 + 4) * 100
    for index, end in enumerate(ended):
        assert end.status == 0, end.err
        assert not [line for line in end.err if line.startswith("error")]
        (line,) = end.out
        assert line == (
            f'{{"process": [{index}, 2], "shape": [8, 2], "total": {total},'
            f' "all": {json.dumps(everyone)}}}'
        )


def test_a_process_killed_in_an_exchange_ends_the_other_with_a_clear_line():
    survivor, killed = run_two("""
        with distributed.together(process):
            for round in range(10**6):
                if process.index == 1 and round == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                distributed.gather_json({"round": round})
    """)
    assert killed.status == -signal.SIGKILL
    assert survivor.status == 1
    assert survivor.err[-1].startswith("error: process 0 of 2 ended because another")
    assert survivor.err[-1].endswith("to resume from the last checkpoint")
    # The killed one cannot speak, so its watcher does.
    assert killed.err[-1].startswith("error: process 1 of 2 ended because another")


def test_a_coordinator_killed_meanwhile_ends_the_other_with_a_clear_line():
    killed, survivor = run_two("""
        with distributed.together(process):
            distributed.barrier("start")
            if process.index == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    """)
    assert killed.status == -signal.SIGKILL
    # The runtime aborts; Python never hears of it.
    assert survivor.status == -signal.SIGABRT
    assert survivor.err[-1].startswith("error: process 1 of 2 ended because another")


def test_a_failure_in_one_process_is_told_and_ends_both_at_once():
    healthy, failed = run_two("""
        with distributed.together(process):
            distributed.barrier("start")
            if process.index == 1:
                raise TypeError("a bug")
            distributed.barrier("never")
    """)
    assert failed.status == 1
    assert "TypeError: a bug" in failed.err
    assert failed.err[-1] == (
        "error: process 1 of 2 failed (TypeError, see above), and the others will end"
        " with it"
    )
    assert healthy.status == 1
    assert healthy.err[-1].startswith("error: process 0 of 2 ended because another")


class Left(BaseException):
    """Stands for the end of the process, which a test had better survive."""


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        (ConfigError("--workdir=x: a file"), 2, "error: --workdir=x: a file"),
        (OSError("disk full"), 1, "error: disk full"),
        (KeyboardInterrupt(), 130, "error: process 1 of 2 interrupted"),
        (SystemExit("no"), 1, "no"),
        (SystemExit(3), 3, "3"),
        (ValueError("Gloo AllGather failed"), 1, "error: process 1 of 2 ended because"),
        (
            ValueError("a bug"),
            1,
            "error: process 1 of 2 failed (ValueError, see above)",
        ),
    ],
    ids=repr,
)
def test_each_failure_has_its_last_line_and_status(
    monkeypatch, capsys, error, status, last
):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left, together(Process(1, 2), plain=(OSError,)):
        raise error
    assert left.value.args == (status,)
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(last)
    told_whole = type(error) is ValueError  # a traceback, for what is no user's fault
    assert (len(said) > 1) == told_whole


def test_a_good_exit_among_several_processes_is_no_failure():
    with pytest.raises(SystemExit), together(Process(1, 2)):
        raise SystemExit(0)


def test_a_meeting_without_the_others_ends_with_a_clear_line():
    waits = free_port()
    alone = start("", 0, port=waits, SPARSEJAX_CONNECT_SECONDS="3")
    lost = start("", 1, port=free_port(), SPARSEJAX_CONNECT_SECONDS="1")
    alone, lost = Ended(alone), Ended(lost)
    assert alone.status == -signal.SIGABRT
    assert alone.err[-1] == (
        f"error: --coordinator=127.0.0.1:{waits}: not all processes met within 3 s;"
        " start every one of them, with the same coordinator and number of processes"
    )
    assert lost.status == 1
    assert "process 1 could not reach it in 1 s (Connection refused)" in lost.err[-1]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port} "):
            initialize(f"localhost:{port}", 2, 0)


def test_devices_in_use_are_too_late_to_meet():
    jax.devices()
    with pytest.raises(
        ConfigError, match=r"could not meet .jax.distributed.initialize"
    ):
        initialize(f"localhost:{free_port()}", 2, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", 2, None), r"--process_id: missing; --coordinator, --processes and"),
        ((None, 2, 0), r"--coordinator: missing"),
        (("h:1", None, 0), r"--processes: missing"),
        (("h", 2, 0), r"--coordinator=h: must be HOST:PORT"),
        ((":1", 2, 0), r"--coordinator=:1: must be HOST:PORT"),
        (("h:x", 2, 0), r"--coordinator=h:x: must be HOST:PORT"),
        (("h:65536", 2, 0), r"--coordinator=h:65536: must be HOST:PORT"),
        (("h:1", 0, 0), r"--processes=0: must be positive"),
        (("h:1", 2, 2), r"--process_id=2: must be in 0 … 1, as --processes=2"),
        (("h:1", 2, -1), r"--process_id=-1: must be in 0 … 1"),
    ],
)
def test_incomplete_or_illegal_flags_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        initialize(*flags)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PROCESSES": "two"}, "SPARSEJAX_PROCESSES=two: must be a whole number"),
        (
            {"DISTRIBUTED": "yes"},
            "SPARSEJAX_DISTRIBUTED=yes: no such mode; one of auto",
        ),
        ({"DISTRIBUTED": "atuo"}, "did you mean 'auto'"),
        ({"HEARTBEAT_SECONDS": "0"}, "SPARSEJAX_HEARTBEAT_SECONDS=0: must be positive"),
        (
            {
                "DISTRIBUTED": "auto",
                "COORDINATOR": "h:1",
                "PROCESSES": "2",
                "PROCESS_ID": "0",
            },
            "SPARSEJAX_DISTRIBUTED=auto: contradicts --coordinator",
        ),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(f"SPARSEJAX_{name}", value)
    with pytest.raises(ConfigError, match=message):
        initialize()


def test_a_flag_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSEJAX_COORDINATOR", "h:1")
    monkeypatch.setenv("SPARSEJAX_PROCESSES", "1")
    monkeypatch.setenv("SPARSEJAX_PROCESS_ID", "0")
    assert initialize() == Process(0, 1)
    with pytest.raises(ConfigError, match="--process_id=5: must be in 0 … 0"):
        initialize(process_id=5)


def test_without_settings_a_process_is_alone():
    assert initialize() == Process(0, 1)
    assert gather_json({"a": (1, 2)}) == [{"a": [1, 2]}]
    barrier("nobody else")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_alone_errors_pass_as_ever(error):
    with pytest.raises(error), together(Process(0, 1)):
        raise error


def test_a_batch_is_cut_over_the_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = {"tokens": np.arange(16).reshape(8, 2)}
    whole = global_batch(batch, rows)
    assert whole["tokens"].sharding == rows
    np.testing.assert_array_equal(whole["tokens"], batch["tokens"])
    with pytest.raises(ValueError, match=r"\{'tokens': \(6, 2\)\} in each of 1"):
        global_batch({"tokens": np.zeros((6, 2))}, rows)
