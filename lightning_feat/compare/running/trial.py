"""A run cut to one batch, to hear what it logs before hours are spent on a metric that nobody logs.

It goes the way of the real ones: fit with validation, test, and what is measured after them; its first epoch and its
last, so that what is logged in the last one or at the end of training is heard, too. Callbacks write nothing and look
at few batches, as under ``fast_dev_run``.
"""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_feat.compare.records import trial_path, write_json
from lightning_feat.compare.running.task import Task

_THEIRS = ("lightning.", "pytorch_lightning.", "torch.", "torchmetrics.", "lightning_feat.compare.", "builtins")
_SCHEDULE = re.compile(r"current_epoch|global_step|max_epochs|max_steps|batch_idx\s*[%+=<>]|fit_loop")


class FirstAndLastEpoch(Callback):
    """Go from the first epoch to the last."""

    def __init__(self) -> None:
        self.begun = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun += 1
        last = (trainer.max_epochs or 0) - 1
        progress: Any = trainer.fit_loop.epoch_progress.current
        if self.begun == 2 and last > progress.completed:
            progress.completed = progress.processed = last

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where there is no last epoch, and where a method goes back to the first, the second one is the end.
        trainer.should_stop = self.begun >= 2


def shorten(trainer: Any) -> None:
    """Train, validate and test on one batch. ``max_epochs`` stays, as schedules depend on it."""
    trainer.fast_dev_run = 2
    trainer.num_sanity_val_steps = 0
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
    trainer.limit_train_batches, trainer.val_check_interval, trainer.check_val_every_n_epoch = 1, 1.0, 1
    for limit in ("limit_val_batches", "limit_test_batches"):
        setattr(trainer, limit, min(1, getattr(trainer, limit)) and 1)
    trainer.callbacks = [FirstAndLastEpoch(), *trainer.callbacks]


def may_log_later(trainer: Any, module: Any) -> bool:
    """Whether something in the run may log now and then, so that a trial did not hear all: a callback that is not
    Lightning's, or a module whose code speaks of epochs or steps.
    """
    if any(not type(callback).__module__.startswith(_THEIRS) for callback in trainer.callbacks):
        return True
    for kind in type(module).__mro__:
        if kind.__module__.startswith(_THEIRS) or kind is object:
            continue
        try:
            if _SCHEDULE.search(inspect.getsource(kind)):
                return True
        except (OSError, TypeError):
            return True
    return False


def write_trial(folder: Path, task: Task, logged: Iterable[str], later: bool) -> None:
    """What was heard, for who waits for it."""
    path = trial_path(folder, task.arm.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"digest": task.digest, "logged": sorted(logged), "may_log_later": later})
