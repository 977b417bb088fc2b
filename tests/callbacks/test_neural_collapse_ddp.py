"""Two processes measure together what one does alone, write once, and stop together."""

import json
import os
import socket
import subprocess
import sys

import ddp_cases_collapse as cases
import pytest

pytest.importorskip("matplotlib")


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
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        errors = [process.communicate(timeout=180)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(path.exists() for path in paths), errors
    return [json.loads(path.read_text()) for path in paths]


def of(pair, name):
    first, second = (results.get(name, f"{name} was not reached") for results in pair)
    assert not isinstance(first, str), first
    assert first == second
    return first


@pytest.mark.parametrize("name", ["indexed_online", "indexed_exact"])
def test_no_sample_of_an_indexed_data_set_counts_twice(pair, name):
    together, alone = of(pair, name), getattr(cases, name)(1)
    assert set(together) == set(alone)
    for measure, value in alone.items():  # logged in float32
        assert together[measure] == pytest.approx(value, rel=1e-5, abs=1e-6), measure


@pytest.mark.parametrize("name", ["written_online", "written_exact"])
def test_files_are_written_once_and_hold_the_values_of_all_processes(pair, name):
    together, alone = of(pair, name), getattr(cases, name)(1)
    assert together["figures"] == alone["figures"] == [f"neural_collapse-penultimate-epoch={n}.png" for n in (1, 2)]
    assert len(together["rows"]) == len(alone["rows"]) == 2
    for one, other in zip(together["rows"], alone["rows"], strict=True):
        assert one.keys() == other.keys()
        # features in other batches: float32 rounding
        assert float(one["nc1_quotient"]) == pytest.approx(float(other["nc1_quotient"]), rel=1e-5)


def test_both_stop_after_the_same_epoch(pair):
    assert of(pair, "stopped") == 2
