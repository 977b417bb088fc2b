"""Who waits for a logged value, and whether it comes when it is waited for."""

import difflib
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_feat.callbacks.neural_collapse.monitor import NeuralCollapseMonitor
from lightning_feat.doctor.blame import name_of
from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.trial import Run, Trial
from lightning_feat.doctor.watch import Watch
from lightning_feat.joints.data.epoch_ends import EpochEnds


def find_awaited(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    """Findings about names that nobody logs, or not in each epoch in which somebody waits for them."""
    if not watch.completed:
        return []
    waiting: list[tuple[str, str, int]] = [  # who, for what, in every how-many-th epoch
        (type(callback).__name__, str(callback.monitor), getattr(callback, "_every_n_epochs", 1) or 1)
        for callback in run.callbacks
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)) and callback.monitor is not None
    ]
    schedules: list[Any] = trial.trainer.lr_scheduler_configs
    waiting += [(type(c.scheduler).__name__, str(c.monitor), c.frequency) for c in schedules if c.reduce_on_plateau]
    findings = []
    for who, name, every in waiting:
        logger = watch.logged_by.get(name)
        ends = None if logger is None else _rare(run.callbacks[logger])
        if name not in watch.logged:
            findings.append(_nobody_logs(who, name, watch))
        elif logger is not None and ends is not None and not _in_time(ends, every):
            findings.append(_late(who, name, name_of(run.callbacks[logger]), ends))
    return findings


def _rare(callback: Callback) -> EpochEnds | None:
    """The epochs in which a callback of ours measures; None where these are all."""
    ends = getattr(callback, "ends", None)
    online = isinstance(callback, NeuralCollapseMonitor) and callback.mode == "online"
    return ends if isinstance(ends, EpochEnds) and ends.every_n_epochs != 1 and not online else None


def _in_time(ends: EpochEnds, every: int) -> bool:
    return isinstance(ends.every_n_epochs, int) and every % ends.every_n_epochs == 0


def _nobody_logs(who: str, name: str, watch: Watch) -> Finding:
    nearest = difflib.get_close_matches(name, watch.logged, n=3, cutoff=0.4) or sorted(watch.logged)[:6]
    return Finding(
        "error",
        "metric-not-logged",
        who,
        f"it waits for {name!r}, which was not logged in an epoch of training and validation.",
        "It would end the training, or never act.",
        f"Nearest: {', '.join(nearest)}." if nearest else "Log it.",
    )


def _late(who: str, name: str, logger: str, ends: EpochEnds) -> Finding:
    n = ends.every_n_epochs
    when = f"in every {n}th epoch"
    if not isinstance(n, int):
        when = "when the run ends" if n is None else "in epochs 1, 2, 3, 4, 6, 8, 12, ..."
    severity: Literal["error", "warning"] = "warning" if ends.first else "error"
    return Finding(
        severity,
        "metric-not-in-every-epoch",
        who,
        f"it waits for {name!r} in epochs in which {logger} does not measure: it comes {when}.",
        "It counts the last value again as one without progress."
        if ends.first
        else "It would end the training at its first look, where there is no value yet.",
        f"Set every_n_epochs=1 of {logger}, or let {who} wait for something that is logged in every epoch.",
    )
