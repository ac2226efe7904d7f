"""Two real processes on loopback train what one process trains."""

import signal

import numpy as np
import pytest

from sparsejax.train.metrics import read_metrics
from tests.train.processes import (
    figures,
    finish,
    free_port,
    launch,
    wait_for_lines,
    write_config,
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_train_alike_and_resume_exactly(tmp_path):
    config = write_config(tmp_path)
    alone, whole, killed = (tmp_path / name for name in ("alone", "whole", "killed"))
    assert finish(launch(config, alone, count=1))[0][0] == 0
    both = finish(launch(config, whole, count=2, port=free_port()))
    assert [status for status, _ in both] == [0, 0], both
    one, two = (
        [row["loss"] for row in read_metrics(folder)] for folder in (alone, whole)
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=2e-6)

    processes = launch(config, killed, count=2, port=free_port())
    wait_for_lines(killed / "metrics.jsonl", 6, processes)
    processes[1].send_signal(signal.SIGKILL)
    (status, line), _ = finish(processes)
    assert status != 0
    assert "process" in line, line
    again = finish(launch(config, killed, count=2, port=free_port()))
    assert [status for status, _ in again] == [0, 0], again
    assert figures(killed) == figures(whole)
