"""Runs in processes of their own, which may be killed.

The script below imports torch once and forks a child for each run: an import costs more than the run. It trains
nothing itself, as a process that has done so cannot be forked.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
_PATIENCE = 120.0  # seconds; a run takes one or two on an idle machine


class Stage:
    """Asks the script for runs. A run is a function of ``runs`` by its name, and its arguments."""

    def __init__(self) -> None:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def together(self, *runs: dict[str, Any], first: int | None = None) -> list[tuple[int, float]]:
        """Exit status of each run, negative for a signal, and the seconds it took. They run side by side, until all
        have ended, or the ``first``, with which the others are killed.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([runs, first]).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 2 * _PATIENCE)
        assert ready, "the stage does not answer"
        return [tuple(ended) for ended in json.loads(self.process.stdout.readline())]

    def run(self, function: str, folder: Path, **arguments: Any) -> int:
        """Exit status of one run; its error, if any, is in ``folder / "error.txt"``."""
        folder.mkdir(parents=True, exist_ok=True)
        return self.together({"function": function, "folder": str(folder), **arguments})[0][0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _child(run: dict[str, Any]) -> None:
    from tests.faults import runs

    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)  # the answers of the script go there
        folder = Path(run.pop("folder"))
        getattr(runs, run.pop("function"))(folder, **run)
        status = 0
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _wait(children: list[int], first: int | None) -> list[tuple[int, float]]:
    began, asked, ended = time.monotonic(), os.getppid(), dict[int, tuple[int, float]]()
    while len(ended) < len(children):
        for child in children:
            if child in ended:
                continue
            done = first is not None and children[first] in ended
            late = done or time.monotonic() - began > _PATIENCE or os.getppid() != asked  # nobody waits any more
            if late:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.02)
    return [ended[child] for child in children]


def main() -> None:
    import torch

    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401

    from tests.faults import runs  # noqa: F401

    for line in sys.stdin:
        children = []
        runs_, first = json.loads(line)
        for run in runs_:
            if not (child := os.fork()):
                _child(run)
            children.append(child)
        print(json.dumps(_wait(children, first)), flush=True)


if __name__ == "__main__":
    main()
