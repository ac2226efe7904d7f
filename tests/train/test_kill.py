"""A run killed at any moment resumes to the same figures."""

import random
import signal
import time

import pytest

from tests.train.processes import figures, finish, launch, wait_for_lines, write_config


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_at_random_moments_change_no_figure(tmp_path):
    config = write_config(tmp_path, steps=200, save_every=1, eval_every=100)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert finish(launch(config, straight, count=1))[0][0] == 0
    record, moments = killed / "metrics.jsonl", random.Random(0)
    for _ in range(10):
        lines = record.read_text().count("\n") if record.exists() else 0
        (process,) = launch(config, killed, count=1)
        wait_for_lines(record, lines + 1, [process])
        # It saves after every step, so most moments lie in or near a save.
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert finish(launch(config, killed, count=1))[0][0] == 0
    assert figures(killed) == figures(straight)
