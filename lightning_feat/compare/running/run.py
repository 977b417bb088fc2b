"""One run, in a process of its own: make it, fit it, and leave a complete folder."""

import contextlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_feat.callbacks.reports.history import MetricHistory
from lightning_feat.compare.records import complete_or_absent, run_path, write_curves, write_json
from lightning_feat.compare.running.pairing import SharedOrder, Witness
from lightning_feat.compare.running.task import Built, Task
from lightning_feat.compare.running.trial import may_log_later, shorten, write_trial

_PACKAGES = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy", "lightning_feat", "timm")


class Recorder(MetricHistory):
    """Keeps what the run logged, and has nothing to report itself."""


def perform(task: Task) -> str:
    """Do the run and leave its folder. An error of the run is written there, not raised.

    Returns:
        ``finished`` or ``failed``.
    """
    status: dict[str, Any] = {"arm": task.arm.name, "seed": task.seed, "status": "failed", "stage": "build"}
    status |= {"digest": task.digest, "started": time.time(), "host": platform.node(), "process": os.getpid()}
    with contextlib.suppress(_NoRun), complete_or_absent(_path(task)) as partial:
        with _output_in(partial / "log.txt") if task.alone else _as_before():
            try:
                _train(task, partial, status)
                status["status"] = "finished"
            except Exception as error:  # of the user's run: told in its log and status, and the others go on
                traceback.print_exc()
                status["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if task.only == "trial" or (task.only == "build" and status["status"] == "finished"):
            shutil.rmtree(partial)
            raise _NoRun
        write_json(partial / "status.json", status)
    return str(status["status"])


class _NoRun(BaseException):
    """It was tried and no more was asked: nothing is left of it."""


def _path(task: Task) -> Path:
    return run_path(Path(task.folder), task.arm.name, task.seed)


def _train(task: Task, partial: Path, status: dict[str, Any]) -> None:
    if task.threads:
        torch.set_num_threads(task.threads)
    if task.arm.digest() != task.digest:
        raise RuntimeError("the files of this arm changed while the study went on: the runs would not be of one arm.")
    before = _resident_peak()
    begin = time.perf_counter()
    seed_everything(task.seed, workers=True, verbose=False)
    built = task.arm.build(task.seed)
    _refuse_several_processes(built.trainer)
    _keep_files_in(built.trainer, partial)
    if built.config:
        (partial / "config.yaml").write_text(built.config)
    status |= {"environment": _environment(built.trainer), "built_s": time.perf_counter() - begin}
    status["options"] = built.options
    witness, recorder = Witness(), Recorder()
    first = [SharedOrder(task.seed), witness] if task.share_order else [witness]
    built.trainer.callbacks = [*first, *built.trainer.callbacks, recorder]
    if task.only == "build":
        return
    if task.only == "trial":
        shorten(built.trainer)
    status["stage"] = "fit"
    _fit(built)
    status["fit_s"] = time.perf_counter() - begin - status["built_s"]
    if getattr(built.trainer, "interrupted", False):
        raise KeyboardInterrupt
    epochs = float(built.trainer.current_epoch)
    curves = {name: list(points) for name, points in recorder.points.items()}
    if task.test:
        status["stage"] = "test"
        _with_data(built.trainer.test, built, verbose=False)
        for name, value in built.trainer.callback_metrics.items():
            if name not in curves:
                curves[name] = [(epochs, float(value))]
    if built.measure is not None:
        status["stage"] = "measure"
        curves |= {name: [(epochs, float(value))] for name, value in built.measure().items()}
    if task.only == "trial":
        write_trial(Path(task.folder), task, curves, may_log_later(built.trainer, built.module))
        return
    if not curves:
        raise RuntimeError("the run logged nothing: let its module call self.log in validation_step.")
    write_curves(partial / "metrics.csv", curves)
    status |= {"epochs": epochs, "steps": built.trainer.global_step, "fingerprint": witness.fingerprint}
    status |= _memory(built.trainer, before if task.alone else None)
    status["stage"] = "done"


def _fit(built: Built) -> None:
    options = {"ckpt_path": built.ckpt_path} if built.ckpt_path else {}
    _with_data(built.trainer.fit, built, **options)


def _with_data(call: Any, built: Built, **options: Any) -> None:
    """Fit or test, with data in the ways that ``fit`` takes them."""
    data = built.data
    testing = call.__name__ == "test"
    if data is None:
        call(built.module, **options)
    elif hasattr(data, "train_dataloader"):
        call(built.module, datamodule=data, **options)
    elif isinstance(data, dict) and data.keys() <= {"train", "val", "test"}:
        loaders = [data.get("test")] if testing else [data.get("train"), data.get("val")]
        call(built.module, *loaders, **options)
    elif isinstance(data, tuple):
        call(built.module, *(data[2:] if testing else data[:2]), **options)
    elif testing:
        raise ValueError(
            "there is nothing to test on: give a datamodule, or data={'train': ..., 'val': ..., 'test': ...}."
        )
    else:
        call(built.module, data, **options)


def _refuse_several_processes(trainer: Any) -> None:
    launcher = getattr(trainer.strategy, "launcher", None)
    total = trainer.num_devices * trainer.num_nodes
    if total > 1 or type(launcher).__name__ == "_MultiProcessingLauncher":
        raise ValueError(
            f"a run with {total} devices and {type(trainer.strategy).__name__} would start processes of its own: give "
            "trainer.devices=1 and trainer.strategy=auto; compare runs several at once, each on a device of its own."
        )


def _keep_files_in(trainer: Any, folder: Path) -> None:
    """One folder for all that the run writes, in place of ``version_*`` that runs side by side would fight for."""
    trainer._default_root_dir = str(folder)
    if trainer.loggers:
        trainer.loggers = [CSVLogger(str(folder), name="logged", version="")]


def _environment(trainer: Any) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name.replace("_", "-"))
    device = trainer.strategy.root_device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": versions,
        "git": git_state(Path.cwd()),
        "device": f"{device.type}: {named}",
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
        "command": sys.argv[1:],
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the working tree, and whether it was changed since; empty outside of one."""
    state = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if done.returncode:
            return {}
        state.append(done.stdout.strip())
    return {"commit": state[0], "changed": bool(state[1])}


def _resident_peak() -> float | None:
    """Most memory that this process held so far, in MB; ``None`` where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _memory(trainer: Any, before: float | None) -> dict[str, Any]:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return {"memory_mb": torch.cuda.max_memory_allocated(device) / 1e6, "memory_of": "GPU, allocated"}
    peak = _resident_peak()
    if before is None or peak is None:
        return {}
    return {"memory_mb": peak - before, "memory_of": "process, beyond what the imports took"}


@contextlib.contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """Standard output and error of the whole process go into a file, those of its children and of C code too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for old, new in zip(kept, (1, 2), strict=True):
                os.dup2(old, new)
                os.close(old)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """For runs in the process of the caller: its random numbers, environment and threads are put back."""
    from lightning.pytorch.utilities.seed import isolate_rng

    environment, threads, grad = dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with isolate_rng(), warnings.catch_warnings():
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            torch.set_grad_enabled(grad)
            torch.set_num_threads(threads)
            os.environ.clear()
            os.environ.update(environment)
