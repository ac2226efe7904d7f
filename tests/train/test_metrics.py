"""The record of a run, its mirror in TensorBoard, the line of progress, the profile."""

import contextlib
import io
import json
import math
import os
import pty
import struct
import termios

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sparsejax.config import ConfigError
from sparsejax.train.metrics import MetricsLog, Profiler, Progress, read_metrics


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def record(workdir, steps, *, resume_step=None):
    with MetricsLog(workdir, resume_step=resume_step) as log:
        for step in steps:
            log.write(step, {"loss": 1 / step, "moe/load": [[0.25, 0.75]]})


def events(workdir):
    """What TensorBoard would show: (step, name) -> value, later starts obeyed."""
    shown = {}
    files = (workdir / "tensorboard").iterdir()
    for file in sorted(files, key=lambda f: int(f.name.rsplit(".", 1)[1])):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                shown = {key: v for key, v in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                shown[event.step, value.tag] = value.simple_value
    return shown


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_float32_metrics_read_back_bit_for_bit(tmp_path_factory, values):
    workdir = tmp_path_factory.mktemp("run")
    array = np.array(values, np.float32)
    with MetricsLog(workdir) as log:
        log.write(1, {"one": array[0], "all": array})
    (line,) = read_metrics(workdir)
    np.testing.assert_array_equal(np.array(line["all"], np.float32), array)
    np.testing.assert_array_equal(np.float32(line["one"]), array[0])


def test_device_arrays_of_every_kind_are_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(
            3,
            {
                "loss": jnp.float32(0.1),
                "half": jnp.array([0.1], jnp.bfloat16),
                "count": jnp.arange(2),
                "live": jnp.array([True]),
                "ragged": [[1], [2.5, jnp.float32(3)]],
            },
        )
    assert read_metrics(tmp_path) == [
        {
            "step": 3,
            "loss": float(np.float32(0.1)),
            "half": [0.10009765625],
            "count": [0, 1],
            "live": [True],
            "ragged": [[1], [2.5, 3.0]],
        }
    ]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 2.0})
    assert lines(tmp_path) == ['{"step": 1, "loss": 2.0}']
    assert events(tmp_path) == {(1, "loss"): 2.0}
    log.close()
    log.close()


def test_resumed_record_equals_the_uninterrupted_one(tmp_path):
    record(tmp_path / "whole", range(1, 8))
    record(tmp_path / "cut", range(1, 6))
    record(tmp_path / "cut", range(4, 8), resume_step=3)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert events(tmp_path / "cut") == events(tmp_path / "whole")


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()


def test_a_half_written_last_line_is_dropped(tmp_path):
    record(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "los')
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2]
    record(tmp_path, [3], resume_step=2)
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_last_line_without_its_newline_does_not_swallow_the_next(tmp_path):
    record(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}')
    record(tmp_path, [2], resume_step=1)
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2]


def test_a_fresh_log_starts_an_empty_record(tmp_path):
    record(tmp_path, [1, 2])
    record(tmp_path, [1])
    assert [x["step"] for x in read_metrics(tmp_path)] == [1]
    assert {step for step, _ in events(tmp_path)} == {1}


@pytest.mark.parametrize("damage", ["nonsense", "[1]", '{"loss": 1}', "\0\0"])
def test_damage_before_the_last_line_is_named_not_repaired(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"jsonl, line 2: not a line of metrics"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"line 2: .*; delete it"):
        MetricsLog(tmp_path, resume_step=3)


def test_lists_become_curves_for_each_layer(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(5, {"d": [0.5, 0.25], "load": [[0.25, 0.75], [0.5, 0.5]]})
    assert events(tmp_path) == {
        (5, "d/layer_00"): 0.5,
        (5, "d/layer_01"): 0.25,
        (5, "load/layer_00/mean"): 0.5,
        (5, "load/layer_00/max"): 0.75,
        (5, "load/layer_01/mean"): 0.5,
        (5, "load/layer_01/max"): 0.5,
    }


def test_what_is_not_a_number_is_refused_by_name(tmp_path):
    with (
        MetricsLog(tmp_path) as log,
        pytest.raises(ValueError, match="metric 'note': 'hello' is not a number"),
    ):
        log.write(1, {"note": "hello"})


def test_steps_do_not_go_back(tmp_path):
    with MetricsLog(tmp_path, resume_step=5) as log:
        log.write(6, {"loss": 1.0})
        log.write(6, {"eval/loss": 1.0})
        with pytest.raises(ValueError, match=r"step=4: .* step 6 is written already"):
            log.write(4, {"loss": 1.0})


def test_an_inactive_log_touches_nothing(tmp_path):
    with MetricsLog(tmp_path / "absent", active=False) as log:
        log.write(1, {"loss": 1.0})
    assert not (tmp_path / "absent").exists()
    assert read_metrics(tmp_path / "absent") == []


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def take(progress, clock, steps, *, log_every=10, tokens=512, seconds=0.5):
    for step in steps:
        clock.now += seconds
        if step % log_every == 0:
            progress.show({"loss": 2.0, "tokens": step * tokens})
        progress.update(step)


def test_without_a_terminal_each_logged_step_is_a_plain_line():
    said, clock = io.StringIO(), Clock()
    progress = Progress(40, stream=said, clock=clock)
    progress.start(0)
    take(progress, clock, range(1, 31))
    progress.report("saved")
    progress.close()
    assert said.getvalue().splitlines() == [
        "step 10/40, loss 2.0000",
        "step 20/40, loss 2.0000, 1.02k tokens/s, 00:10 left",
        "step 30/40, loss 2.0000, 1.02k tokens/s, 00:05 left",
        "saved",
    ]


def test_speed_is_that_of_the_recent_past():
    said, clock = io.StringIO(), Clock()
    progress = Progress(1000, stream=said, clock=clock)
    progress.start(0)
    take(progress, clock, range(1, 101), log_every=1, seconds=9.0)
    take(progress, clock, range(101, 201), log_every=1, seconds=0.5)
    assert (
        said.getvalue().splitlines()[-1]
        == "step 200/1000, loss 2.0000, 1.02k tokens/s, 06:40 left"
    )


def test_a_resumed_run_counts_only_its_own_steps():
    said, clock = io.StringIO(), Clock()
    progress = Progress(140, stream=said, clock=clock)
    progress.start(100)
    take(progress, clock, range(101, 121))
    assert (
        said.getvalue().splitlines()[-1]
        == "step 120/140, loss 2.0000, 1.02k tokens/s, 00:10 left"
    )


def test_evaluation_is_shown_and_nothing_needs_a_loss():
    said = io.StringIO()
    progress = Progress(2, stream=said, clock=Clock())
    progress.start(0)
    progress.show({"loss": math.nan, "eval/bits_per_byte": 1.25, "tokens": 3})
    progress.update(1)
    progress.show({})
    progress.update(2)
    assert said.getvalue() == "step 1/2, loss nan, eval 1.2500 bits/byte\nstep 2/2\n"


class Terminal:
    """A terminal of 90 columns: a stream to write to, and what it shows."""

    def __init__(self):
        self._screen, self.keyboard = pty.openpty()
        os.set_blocking(self._screen, False)
        self.stream = os.fdopen(self.keyboard, "w")
        self.resize(90)

    def resize(self, columns):
        termios.tcsetwinsize(self.keyboard, (24, columns))

    def read(self):
        self.stream.flush()
        with contextlib.suppress(BlockingIOError):
            return os.read(self._screen, 2**16).decode().replace("\r\n", "\n")
        return ""

    def close(self):
        self.stream.close()
        os.close(self._screen)


@pytest.fixture
def terminal():
    with contextlib.closing(Terminal()) as terminal:
        yield terminal


def test_an_inactive_process_says_nothing(terminal):
    progress = Progress(2, active=False, stream=terminal.stream)
    progress.start(0)
    progress.show({"loss": 1.0})
    progress.update(1)
    progress.report("saved")
    progress.close()
    assert terminal.read() == ""


def test_on_a_terminal_messages_stand_above_the_moving_line(terminal):
    progress = Progress(20, stream=terminal.stream)
    progress.start(0)
    progress.show({"loss": 1.5})
    progress.update(10)
    progress.report("saved step 10")
    progress.update(20)
    progress.close()
    before, _, after = terminal.read().partition("saved step 10\n")
    # The moving line is wiped, so the message begins at an empty line.
    assert before.endswith("\r")
    last = after.split("\r")[-1]
    assert last.startswith("20/20 |")
    assert last.endswith("| loss 1.5000\n")


def test_a_terminal_of_unknown_width_gets_plain_lines(terminal):
    terminal.resize(0)
    progress = Progress(2, stream=terminal.stream)
    progress.start(0)
    progress.show({"loss": 1.5})
    progress.update(1)
    assert terminal.read() == "step 1/2, loss 1.5000\n"


@pytest.mark.parametrize("spec", ["", "5", "a:b", "5:5", "6:5", "1:2:3", " 1:2"])
def test_a_profile_needs_two_ordered_steps(tmp_path, spec):
    with pytest.raises(ConfigError, match=f"^--profile={spec}: must be START:STOP"):
        Profiler(spec, tmp_path)


@pytest.mark.parametrize("spec", ["0:1", "9:12"])
def test_a_profile_of_no_step_of_the_run_is_refused(tmp_path, spec):
    with pytest.raises(ConfigError, match=f"--profile={spec}: .* the steps 1 to 8"):
        Profiler(spec, tmp_path, steps=8)
    Profiler("8:12", tmp_path, steps=8)


@pytest.fixture
def traced(monkeypatch):
    """Steps' own record of when the profiler starts and stops."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("first", "calls"),
    [
        (1, [1, 2, "start", 3, 4, "stop", 5, 6]),
        (4, ["start", 4, "stop", 5, 6]),
        (5, [5, 6]),
    ],
)
def test_exactly_the_named_steps_are_traced(tmp_path, traced, first, calls):
    profiler = Profiler("3:5", tmp_path)
    for step in range(first, 7):
        profiler.at(step, after=jnp.zeros(1))
        traced.append(step)
    profiler.close()
    assert traced == calls


def test_a_run_that_ends_inside_its_profile_still_writes_it(tmp_path, traced):
    profiler = Profiler("2:9", tmp_path)
    profiler.at(2)
    profiler.close()
    profiler.close()
    assert traced == ["start", "stop"]


def test_no_profile_traces_nothing(tmp_path, traced):
    Profiler(None, tmp_path / "profile").at(0)
    assert traced == []
    assert not (tmp_path / "profile").exists()


def test_a_profile_is_written(tmp_path):
    profiler = Profiler("0:1", tmp_path / "profile")
    profiler.at(0)
    jnp.ones(3).sum().block_until_ready()
    profiler.at(1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_record_is_json_lines(tmp_path):
    record(tmp_path, [1])
    assert [json.loads(x) for x in lines(tmp_path)] == read_metrics(tmp_path)
