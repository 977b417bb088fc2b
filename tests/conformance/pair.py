"""Two gloo processes, started once, run all cells that need a pair; what each of them found goes into a file."""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from dataclasses import astuple
from pathlib import Path

import torch

Found = dict[str, list[str]]  # by cell: the word and the detail of an outcome, or "raised" and a traceback


def run_pair(folder: Path) -> list[Found]:
    """Start the pair, wait, and give what each process found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    files = [folder / f"{rank}.json" for rank in range(2)]
    tests = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.pair", str(file)],
            env={**os.environ, **where, "LOCAL_RANK": str(rank), "PYTHONPATH": tests},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=280)[1].decode()[-3000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(file.exists() for file in files), errors
    return [json.loads(file.read_text()) for file in files]


def main(file: Path) -> None:
    from tests.conformance.cells import outcome
    from tests.conformance.conditions import CONDITIONS
    from tests.conformance.registry import CALLBACKS

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: Found = {}
    for condition in CONDITIONS:
        for entry in CALLBACKS if condition.where == "pair" and condition.available else []:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found[f"{entry}, {condition}"] = list(astuple(outcome(entry, condition, Path(folder))))
            except BaseException:
                found[f"{entry}, {condition}"] = ["raised", traceback.format_exc()]
            file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
