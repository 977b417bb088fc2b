"""Run a file of cases on two gloo processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = str(Path(__file__).parents[1])


def run_pair(cases: ModuleType, folder: Path) -> list[dict[str, Any]]:
    """The results of all cases on both processes, by name; an error is a string. ``cases`` has a ``main`` as
    ``tests.joints.ddp_cases`` has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    paths = [folder / f"{rank}.json" for rank in range(2)]
    processes = []
    for rank, path in enumerate(paths):
        env = {
            **os.environ,
            **where,
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ROOT,
        }
        command = [sys.executable, "-m", cases.__name__, str(path)]
        out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=env, cwd=folder, **out))
    try:
        errors = [process.communicate(timeout=180)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(path.exists() for path in paths), errors
    return [json.loads(path.read_text()) for path in paths]
