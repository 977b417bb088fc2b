"""Run a file of cases on two gloo processes.

They are forked from a server that has imported what all of them need, as the imports take longer than the cases; it
has trained nothing, as a process that has done so cannot be forked.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.multiprocessing

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["lightning.pytorch", "torch.distributed.fsdp", "lightning_feat.callbacks"])


def run_pair(cases: ModuleType, folder: Path, patience: float = 180.0) -> list[dict[str, Any]]:
    """The results of all cases on both processes, by name; an error is a string. ``cases`` runs as ``python -m`` does,
    with the file for its results as its only argument, as ``tests.joints.ddp_cases``.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the server, which starts with the first pair
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    paths = [folder / f"{rank}.json" for rank in range(2)]
    processes = [
        _FORKED.Process(target=_run, args=(cases.__name__, path, {**where, "LOCAL_RANK": str(rank)}), daemon=False)
        for rank, path in enumerate(paths)
    ]
    until = time.monotonic() + patience
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    assert all(path.exists() for path in paths), [path.with_suffix(".err").read_text()[-3000:] for path in paths]
    return [json.loads(path.read_text()) for path in paths]


def two_processes(worker: Callable[..., object], *arguments: object) -> None:
    """Call ``worker(process, port, *arguments)`` on two processes, which meet at that port of this machine."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.start_processes(worker, (free_port(), *arguments), nprocs=2, start_method="forkserver")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _run(name: str, path: Path, where: dict[str, str]) -> None:
    os.chdir(path.parent)
    os.environ.update(where)
    sys.argv = [name, str(path)]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(path.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), 2)
    runpy.run_module(name, run_name="__main__", alter_sys=True)
