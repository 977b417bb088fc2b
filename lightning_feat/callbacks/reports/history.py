"""What was logged, epoch by epoch: the memory of the callbacks that report on a whole run at its end."""

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_feat.joints.arguments import checked
from lightning_feat.joints.run.spared import run_spared


class MetricHistory(Callback):
    """Keep every logged metric against the epochs completed, from the first to the last epoch of a run.

    ``points`` maps a name to pairs ``(epochs, value)``: after the first epoch 1.0, after a validation in the middle of
    the next one 1.5. A metric has a point only where it was measured anew. What other callbacks or the module log at
    the end of an epoch belongs to it, whatever the order of the callbacks; the sanity check does not. The history is
    part of the checkpoint, so a resumed run has all of it; of a checkpoint saved by a validation, before the end of its
    epoch, the training values of that one epoch are missing, which Lightning does not keep either. Where the number of
    batches is unknown, validations inside an epoch are not told apart, and the last one counts.

    A subclass may define ``report``, called on one process when fitting ends, be it complete, stopped early,
    interrupted or broken off by an error. What goes wrong in it becomes a warning: a report is not worth a run.
    """

    @checked
    def __init__(self) -> None:
        self.points: dict[str, list[tuple[float, float]]] = {}
        self._last: dict[str, Tensor] = {}
        self._before_validation: dict[str, Tensor] = {}
        self._epochs, self._epoch_is_over, self._fitting = 0.0, False, False

    def report(self, trainer: Trainer) -> None:
        """Tell about ``points``. It must not communicate with other processes: only one comes here."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            self.points = {}  # of an earlier run; a checkpoint, if any, is loaded after this

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last, self._epoch_is_over, self._fitting = {}, False, True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._fitting or trainer.sanity_checking:
            return
        batches, done = trainer.num_training_batches, trainer.fit_loop.batch_idx + 1
        if done < batches < float("inf"):
            self._epochs = trainer.current_epoch + done / batches
        elif done <= batches:
            self._epochs = trainer.current_epoch + 1.0
        self._record(new_since(self._before_validation, trainer.callback_metrics))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches, done = trainer.num_training_batches, trainer.fit_loop.batch_idx + 1
        unfinished = done < batches < float("inf")  # by max_steps, for one
        self._epochs = trainer.current_epoch + (done / batches if unfinished else 1.0)
        self._epoch_is_over = True
        self._record(new_since(self._last, trainer.callback_metrics))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complete_epoch(trainer)
        self._epoch_is_over = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complete_epoch(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._complete_epoch(trainer)  # state_dict was asked before, and without a trainer to complete it from
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complete_epoch(trainer)  # with what others have measured when the run ended early
        self._report_once(trainer)  # not in on_train_end: the progress bar would still be in the way

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._report_once(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"points": {name: [list(point) for point in points] for name, points in self.points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = {name: [(x, y) for x, y in points] for name, points in state_dict["points"].items()}

    def _complete_epoch(self, trainer: Trainer) -> None:
        """Add what was logged for the epoch after this callback had its turn, and nothing that is there already."""
        if self._epoch_is_over:
            late = new_since(self._last, trainer.callback_metrics)
            there = {name for name, points in self.points.items() if points[-1][0] == self._epochs}
            self._record({name: value for name, value in late.items() if name not in there})

    def _record(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            set_point(self.points.setdefault(name, []), self._epochs, float(value))
        self._last.update(values)

    def _report_once(self, trainer: Trainer) -> None:
        fitting, self._fitting = self._fitting, False
        if not fitting or not trainer.is_global_zero:
            return
        with run_spared(type(self).__name__, "report on the run"):
            self.report(trainer)


def set_point(line: list[tuple[float, float]], epochs: float, value: float) -> None:
    """Add a value to a line in time. Where it was measured before, by a run that was set back, the later one counts."""
    while line and line[-1][0] >= epochs:
        line.pop()
    line.append((epochs, value))


def new_since(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that were measured anew.

    ``trainer.callback_metrics`` keeps a value until the next one comes, so that a metric of every fifth epoch is there
    in all of them. A new value is a new tensor; ``before`` keeps the old one alive, so their addresses differ.
    """
    return {
        name: value for name, value in now.items() if name not in before or before[name].data_ptr() != value.data_ptr()
    }


Selection = list[str] | dict[str, str]  # patterns for metric names, or what to call each of them


def select(metrics: Selection, names: Iterable[str]) -> dict[str, str]:
    """What to call each metric that matches a pattern, in the order of the patterns; a metric is taken once.

    Patterns are those of file names, ``*``, ``?`` and ``[...]``; a metric of exactly that name comes before all others.

    A list leaves out what all names share at their beginning and end: ``train`` and ``val`` of ``train/loss`` and
    ``val/loss``. A dict gives the pattern for each name to show; where several metrics match, what differs is added.

    Example:
        >>> logged = ["nc/nc1/fc", "nc/nc2/fc", "nc/nc2/conv"]
        >>> select(["nc/nc?/fc"], logged)
        {'nc/nc1/fc': 'nc1', 'nc/nc2/fc': 'nc2'}
        >>> select({"variability": "nc/nc1/*", "NC2": "nc/nc2/*"}, logged)
        {'nc/nc1/fc': 'variability', 'nc/nc2/fc': 'NC2 fc', 'nc/nc2/conv': 'NC2 conv'}
    """
    names = list(names)

    def matching(pattern: str) -> list[str]:
        return [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]

    if not isinstance(metrics, dict):
        return shorten(list(dict.fromkeys(name for pattern in metrics for name in matching(pattern))))
    shown: dict[str, str] = {}
    for title, pattern in metrics.items():
        found = shorten([name for name in matching(pattern) if name not in shown])
        shown.update({name: title if len(found) == 1 else f"{title} {short}" for name, short in found.items()})
    return shown


def shorten(names: list[str]) -> dict[str, str]:
    """Each name without the parts between slashes that begin or end all of them; one name alone stays whole."""
    parts = [name.split("/") for name in names]
    most = min(map(len, parts), default=1) - 1 if len(parts) > 1 else 0  # something must be left of each
    head = next((i for i in range(most) if len({part[i] for part in parts}) > 1), most)
    tail = next((i for i in range(most - head) if len({part[-1 - i] for part in parts}) > 1), most - head)
    return {name: "/".join(part[head : len(part) - tail]) for name, part in zip(names, parts, strict=True)}


def unmatched(metrics: Selection, names: Iterable[str]) -> list[str]:
    """A sentence for each pattern that no metric matches, naming the nearest."""
    names = list(names)
    patterns = metrics.values() if isinstance(metrics, dict) else metrics
    sentences = []
    for pattern in patterns:
        if not select([pattern], names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:8]
            sentences.append(f"nothing logged matches {pattern!r}; nearest: {', '.join(near) or 'nothing was logged'}.")
    return sentences
