"""Two processes do together what one does alone."""

import json
import os
import socket
import subprocess
import sys

import ddp_cases_simplex as cases
import pytest


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of both cases on two processes."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    paths = [folder / f"{rank}.json" for rank in range(2)]
    processes = []
    for rank, path in enumerate(paths):
        env = {**os.environ, **where, "NODE_RANK": "0", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, cases.__file__, str(path)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        errors = [process.communicate(timeout=180)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(path.exists() for path in paths), errors
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("name", ["dot_regression", "collapse"])
def test_both_processes_end_bit_for_bit_alike(pair, name):
    assert not isinstance(pair[0][name], str), pair[0][name]
    assert pair[0][name] == pair[1][name]


def test_dot_regression_equals_one_process(pair):
    # float32, 6 steps: mean of two half batches instead of one mean
    assert pair[0]["dot_regression"] == pytest.approx(cases.dot_regression(1), rel=1e-4, abs=2e-5)


def test_pull_and_push_are_the_mean_over_the_batches_of_the_processes(pair):
    assert pair[0]["collapse"] == pytest.approx(cases.halves(), rel=1e-4, abs=2e-5)
    # Not one process with the whole batch: classes are averaged within each process.
    assert pair[0]["collapse"] != pytest.approx(cases.collapse(1), rel=1e-3, abs=1e-4)
