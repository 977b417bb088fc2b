"""Two processes do together what one does alone."""

import json
import os
import socket
import subprocess
import sys

import ddp_cases_shift as cases
import pytest


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of all cases on two processes."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    paths = [folder / f"{rank}.json" for rank in range(2)]
    processes = []
    for rank, path in enumerate(paths):
        env = {**os.environ, **where, "NODE_RANK": "0", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, cases.__file__, str(path)]
        processes.append(
            subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
    try:
        errors = [process.communicate(timeout=180)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(path.exists() for path in paths), errors
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("name", ["shift", "l2_sp", "distillation", "monitor", "cached", "towers"])
def test_both_processes_end_alike(pair, name):
    assert not isinstance(pair[0].get(name, "it did not run"), str), pair[0].get(name)
    assert pair[0][name] == pair[1][name]


def test_two_processes_do_what_two_do_by_hand(pair):
    assert pair[0]["shift"] == pytest.approx(pair[0]["by_hand"], rel=1e-5, abs=1e-6)  # terms in another order


@pytest.mark.parametrize("name", ["l2_sp", "distillation"])
def test_penalties_that_are_means_equal_one_process(pair, name):
    # float32, 6 steps: the mean of two half batches in place of one mean
    assert pair[0][name] == pytest.approx(getattr(cases, name)(1), rel=1e-4, abs=2e-5)


def test_the_monitor_sums_over_processes(pair):
    alone = cases.monitor(1)
    assert len(alone) == 4
    assert pair[0]["monitor"] == pytest.approx(alone, rel=1e-3, abs=1e-6)  # weights of 6 float32 steps


def test_every_process_holds_the_cached_features_of_all(pair):
    assert pair[0]["cached"] == pytest.approx(cases.cached(1), rel=1e-5, abs=1e-6)  # float32, other batches
