"""``compare`` with processes of its own: what inline runs cannot show."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from lightning_feat.compare import compare
from lightning_feat.compare.running.executors import LocalProcesses, cores, submitit_executor, visible_gpus
from tests.compare import cases

SCRIPT = """
import sys
from lightning_feat.compare import compare
from tests.compare import cases

if __name__ == "__main__":
    arms = {"base": cases.slow_base, "faster": cases.slow_faster}
    compare(arms, 8, ["val/accuracy", "val/loss"], folder=sys.argv[1], jobs=2, threads=1)
"""


def in_processes(folder, arms, seeds=2, **options):
    return compare(arms, seeds, "val/loss", folder=folder, jobs=2, threads=1, quiet=True, **options)


@pytest.mark.slow
def test_processes_give_what_this_process_gives(tmp_path):
    arms = {"base": cases.base, "faster": cases.faster}
    here = compare(arms, 2, "val/loss", folder=tmp_path / "a", threads=1, executor="inline", quiet=True)
    there = in_processes(tmp_path / "b", arms)
    assert there.table == here.table
    logged = {record.status["process"] for record in there.records}
    assert len(logged) == 4
    assert os.getpid() not in logged
    assert {record.status["environment"]["threads"] for record in there.records} == {1}
    assert all(record.status["memory_mb"] > 0 for record in there.records)
    assert "max_epochs=2` reached" in (there.records[0].folder / "log.txt").read_text()
    assert not list((tmp_path / "b").glob("runs/*/.*"))


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_reported_and_the_rest_goes_on(tmp_path):
    made = in_processes(tmp_path, {"base": cases.base, "killed": cases.killed_with_seed_1}, seeds=3)
    assert made.effects[0].seeds == [0, 2]
    assert made.problems[0].startswith("FAILED: killed, seed 1: its process was ended by SIGKILL")


@pytest.mark.slow
def test_an_arm_far_down_the_queue_that_cannot_be_built_is_told_before_the_runs(tmp_path):
    arms = {f"slow{i}": cases.slow_base for i in range(3)} | {"broken": cases.cannot_be_built}
    with pytest.raises(RuntimeError, match="arm 'broken' cannot be built"):
        in_processes(tmp_path, arms, seeds=1)
    assert not list(tmp_path.glob("runs/*/.*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_three_times_at_random_it_gives_the_same_table(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(folder):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        return subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole = start(tmp_path / "whole")
    assert "val/loss" in whole.communicate(timeout=600)[0]
    chance = random.Random(0)
    kills = 0

    def statuses():
        return list((tmp_path / "killed").glob("runs/*/seed_*/status.json"))

    while kills < 3:
        process, there = start(tmp_path / "killed"), len(statuses())
        # At random between the first news of this start and the end of about two more runs.
        while process.poll() is None and len(statuses()) < there + 1:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 1.2))
        assert process.poll() is None, process.communicate()[0]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert len(statuses()) < 16
    last = start(tmp_path / "killed")
    said = last.communicate(timeout=600)[0]
    assert last.returncode == 0, said
    assert (tmp_path / "killed/table.md").read_text() == (tmp_path / "whole/table.md").read_text()
    for path in (tmp_path / "whole").glob("runs/*/seed_*/metrics.csv"):
        other = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes()
    assert not list((tmp_path / "killed").glob("runs/*/.*"))


@pytest.mark.slow
def test_jobs_of_submitit(tmp_path):
    pytest.importorskip("submitit")
    arms = {"base": cases.base, "killed": cases.killed_with_seed_1}
    made = compare(
        arms,
        2,
        "val/loss",
        folder=tmp_path / "a",
        executor="slurm",
        slurm={"cluster": "local", "timeout_min": 5},
        threads=1,
        quiet=True,
    )
    here = compare(
        arms | {"killed": cases.base}, 1, "val/loss", folder=tmp_path / "b", threads=1, executor="inline", quiet=True
    )
    assert made.effects[0].seeds == [0]
    assert made.effects[0].base_values == here.effects[0].base_values
    assert any(problem.startswith("FAILED: killed, seed 1") for problem in made.problems)


def test_an_option_that_submitit_does_not_know_is_told(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="patrition"):
        submitit_executor(tmp_path, {"cluster": "local", "patrition": "gpu"})


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-feat\[slurm\]"'):
        submitit_executor(tmp_path, {})


def test_each_gpu_is_named_once(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    assert cores() >= 1


def note(folder, name):
    time.sleep(0.3)
    (folder / name).write_text(f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.environ['OMP_NUM_THREADS']}")


@pytest.mark.slow
def test_processes_at_work_together_have_different_gpus(tmp_path):
    executor = LocalProcesses(2, threads=3, gpus=["4", "6"])
    for name in ("a", "b"):
        executor.submit(note, tmp_path, name)
    executor.shutdown()
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["4 3", "6 3"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"] != "4"
