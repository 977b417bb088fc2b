"""Who runs the runs: executors of the ``concurrent.futures`` kind, each task in a process of its own.

A process of its own frees all memory, shows the peak of its own run, and takes nobody with it when it is killed, which
a pool of workers would.
"""

import concurrent.futures
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
PRELOADED = "lightning_feat.compare.running.run"


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Their names in ``CUDA_VISIBLE_DEVICES``, without starting CUDA or importing torch."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


class LocalProcesses(concurrent.futures.Executor):
    """Processes of this machine, ``jobs`` at a time. The result of a task is that its process ended; what it made is on
    disk.

    On Linux the processes are forked from a server that has imported Lightning and nothing else, elsewhere spawned.

    Args:
        jobs: processes at a time.
        threads: of each, so that they do not fight for cores.
        gpus: names for ``CUDA_VISIBLE_DEVICES``; each process sees one, by turns.
    """

    def __init__(self, jobs: int, threads: int, gpus: list[str] | None = None) -> None:
        self._threads = threads
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)
        self._gpus = gpus or []
        self._pool = concurrent.futures.ThreadPoolExecutor(jobs, thread_name_prefix="compare")
        self._running: set[Any] = set()
        self._lock = threading.Lock()
        self._over = False
        linux = sys.platform.startswith("linux")
        self._context: Any = multiprocessing.get_context("forkserver" if linux else "spawn")
        if linux:
            self._context.set_forkserver_preload([PRELOADED])

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[None]":  # type: ignore[override]
        """Run it in a new process. The future raises ``RuntimeError`` if that was killed or ended by an error."""
        return self._pool.submit(self._run, function, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for what was submitted; with ``cancel_futures`` end the processes that run, too."""
        if cancel_futures:
            with self._lock:
                self._over = True
                for process in self._running:
                    process.kill()
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        slot = self._slots.get()
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        process = self._context.Process(
            target=_in_child, args=(function, args, kwargs, self._threads, gpu, os.getpid()), daemon=False
        )
        try:
            with self._lock:
                if self._over:
                    return
                with _thread_variables(self._threads):
                    process.start()
                self._running.add(process)
            process.join()
        finally:
            with self._lock:
                self._running.discard(process)
            self._slots.put(slot)
        if process.exitcode:
            raise RuntimeError(_how_it_ended(process.exitcode))


class InThisProcess(concurrent.futures.Executor):
    """One after another, here: for functions that cannot be sent elsewhere, and for debugging."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":  # type: ignore[override]
        """Run it now."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # a future holds what its function raised, and raises it where it is asked
            future.set_exception(error)
        return future


def submitit_executor(folder: Path, options: Mapping[str, Any]) -> Any:
    """Jobs of a SLURM cluster by ``submitit``, with a job for each run; this process waits for them.

    Args:
        folder: for its scripts and logs; all nodes must see it.
        options: of ``submitit.AutoExecutor.update_parameters``, such as ``timeout_min`` and ``slurm_partition``;
            ``cluster="local"`` runs them here.

    Raises:
        ModuleNotFoundError: without submitit.
        ValueError: for an option that it does not know.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'runs on a cluster need submitit, which is not installed: pip install "lightning-feat[slurm]"'
        ) from error
    options = dict(options)
    executor = submitit.AutoExecutor(folder=str(folder), cluster=options.pop("cluster", "slurm"))
    try:
        executor.update_parameters(**{"name": "compare", **options})
    except (NameError, ValueError, TypeError) as error:
        raise ValueError(f"slurm={options}: {error}") from error
    return executor


def wait_for_one(jobs: list[Any]) -> list[Any]:
    """Those that are done, of futures or jobs of submitit; waits for the first."""
    if all(isinstance(job, concurrent.futures.Future) for job in jobs):
        return list(concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_COMPLETED).done)
    while True:
        done = [job for job in jobs if job.done()]
        if done:
            return done
        time.sleep(0.5)


def in_child() -> bool:
    """Whether this process is a child that still reads the user's script: it lacks ``if __name__ == "__main__"``."""
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def _in_child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int,
    gpu: str | None,
    starter: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    threading.Thread(target=_end_with, args=(starter, os.getppid()), daemon=True).start()
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    function(*args, **kwargs)


def _end_with(starter: int, parent: int) -> None:
    """End this process when who started it is gone: a run that nobody waits for would be in the way of the next."""
    while os.getppid() == parent and _alive(starter):
        time.sleep(0.5)
    os._exit(1)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _thread_variables:
    """For the server of forks, which hands its environment on. Put back at the end."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(self._threads)))

    def __exit__(self, *exc: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _how_it_ended(exitcode: int) -> str:
    if exitcode >= 0:
        return f"its process ended with exit code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = str(-exitcode)
    out_of_memory = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{out_of_memory}"
