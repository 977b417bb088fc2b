"""Two machines, as launchers make them: the same as processes that a script starts. Both machines are this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.joints.launched import fit, several, weights
from tests.pairs import free_port

ROOT = Path(__file__).parents[2]
MODULE = "tests.joints.launched"


def launch(folder, commands, environments):
    """Run one command a machine, each with its part of the environment; what the processes found, by rank."""
    folder.mkdir()
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    common = {**bare, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *command], env={**common, **more}, stderr=subprocess.PIPE, cwd=folder
        )
        for command, more in zip(commands, environments, strict=True)
    ]
    try:
        errors = [process.communicate(timeout=280)[1].decode()[-3000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), errors
    return [json.loads(file.read_text()) for file in files]


def by_script(folder):
    port = free_port()
    script = {"MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    return launch(folder, [["-m", MODULE, folder, "2"]] * 2, [{**script, "NODE_RANK": str(node)} for node in range(2)])


def by_torchrun(folder):
    port = free_port()

    def command(node):
        where = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}"]
        return ["-m", "torch.distributed.run", *where, "--master-addr=127.0.0.1", f"--master-port={port}"]

    each = [[*command(node), "-m", MODULE, folder, "2"] for node in range(2)]
    return launch(folder, each, [{}, {}])


def by_slurm(folder):
    """The environment that ``srun`` makes on two nodes with a task each."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_LOCALID": "0",
        "MASTER_PORT": free_port(),
    }
    tasks = [{**job, "SLURM_PROCID": str(node), "SLURM_NODEID": str(node)} for node in range(2)]
    return launch(folder, [["-m", MODULE, folder, "2"]] * 2, tasks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launched") / "script"


@pytest.fixture(scope="module")
def plain(folder):
    return by_script(folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_torchrun, by_slurm])
def test_a_launcher_makes_the_run_of_a_script(launcher, plain, tmp_path):
    found = launcher(tmp_path / "launched")
    assert [result["world_size"] for result in found] == [2, 2]
    assert found == plain


@pytest.mark.slow
def test_both_machines_end_alike(plain):
    first, second = plain
    assert {**first, "rank": 1} == second
    assert first["slow"].count(True) > 0


@pytest.mark.slow
def test_a_run_of_two_goes_on_with_one(plain, folder, tmp_path):
    """As after an elastic restart with fewer machines: what the two would have done, up to rounding."""
    _, alone = fit(tmp_path, 1, several(), ckpt_path=folder / "both.ckpt", epochs=4)
    # float32, 16 steps: one mean in place of the mean of two half batches
    assert weights(alone) == pytest.approx(plain[0]["resumed"], rel=1e-3, abs=1e-4)
