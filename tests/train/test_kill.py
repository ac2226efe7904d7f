"""A run killed at any moment resumes to the same figures."""

import random
import signal
import time

import pytest

from tests.train.processes import figures, finish, launch, write_config


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_figure(tmp_path):
    config = write_config(tmp_path, steps=60, save_every=1, eval_every=30)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert finish(launch(config, straight, count=1))[0][0] == 0
    moments = random.Random(0)
    steps = []
    for _ in range(10):
        (process,) = launch(config, killed, count=1)
        record, seen = killed / "metrics.jsonl", len(steps)
        lines = record.read_text().count("\n") if record.exists() else 0
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            now = record.read_text().count("\n") if record.exists() else 0
            if now > lines:
                break
            time.sleep(0.01)
        # It saves after every step, so most moments lie in or near a save.
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append(lines)
        assert len(steps) == seen + 1
    assert finish(launch(config, killed, count=1))[0][0] == 0
    assert figures(killed) == figures(straight)
