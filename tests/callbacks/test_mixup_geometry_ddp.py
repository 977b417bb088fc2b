"""Two processes do together what one does alone."""

import json
import os
import socket
import subprocess
import sys

import ddp_cases_mixup as cases
import pytest


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of the case on two processes."""
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


def test_two_processes_log_what_one_does(pair):
    assert not isinstance(pair[0]["measures"], str), pair[0]["measures"]
    assert pair[0] == pair[1]
    alone = cases.measures(1)
    for name in ("plane_residual", "slope", "calibration_error"):
        key = f"mixup_geometry/{name}/penultimate"
        # Logged in float32, from batches of another size.
        assert pair[0]["measures"][key] == pytest.approx(alone[key], rel=1e-5, abs=1e-6), name
