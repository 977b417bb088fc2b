"""At the end of which epochs a callback measures, and how it catches up when the run ends in another."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_feat.joints.run.averaging import WhichWeights, holds_average, refuse_no_average, with_weights


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether no epoch follows the one that ends: by ``max_epochs``, ``max_steps``, or a callback that stopped it.

    ``EarlyStopping`` and others may have their turn later, see ``EpochEnds.missed``.
    """
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    epochs = trainer.current_epoch + 1
    may_stop = epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return epochs == trainer.max_epochs or by_steps or (trainer.should_stop and may_stop)


class EpochEnds:
    """The epochs to measure at the end of: every n-th, the last and, by default, the first.

    Args:
        every_n_epochs: n; ``"log"`` for 1, 2, 3, 4, 6, 8, 12, 16, 24, ...; None for none but the last.
        first: whether the first belongs to them.
    """

    def __init__(self, every_n_epochs: int | Literal["log"] | None, first: bool = True) -> None:
        self.every_n_epochs, self.first = every_n_epochs, first
        self._measured: int | None = None

    def begin(self) -> None:
        """Begin a fit."""
        self._measured = None

    def is_due(self, trainer: Trainer) -> bool:
        """Whether to measure in the epoch that ends."""
        epoch, n = trainer.current_epoch + 1, self.every_n_epochs
        if is_last_epoch(trainer) or (self.first and epoch == 1):
            return True
        if n == "log":
            return epoch & (epoch - 1) == 0 or (epoch % 3 == 0 and (epoch // 3) & (epoch // 3 - 1) == 0)
        return n is not None and epoch % n == 0

    def note(self, trainer: Trainer) -> None:
        """This epoch is measured."""
        self._measured = trainer.current_epoch

    def missed(self, trainer: Trainer) -> bool:
        """In ``on_train_end``: whether the last epoch was not known to be the last, and was not measured."""
        return trainer.current_epoch > 0 and self._measured != trainer.current_epoch - 1


@contextmanager
def back_in_last_epoch(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """In ``on_train_end``: inside, it is the end of the last epoch once more, and what is logged belongs to it.

    ``EarlyStopping`` has its turn after all others at the end of an epoch, and ends the run there.
    """
    progress, loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
    hook, connector = module._current_fx_name, trainer._logger_connector
    progress.completed -= 1
    loop._batches_that_stepped -= 1  # as Lightning does when it logs the values of an epoch
    module._current_fx_name = "on_train_epoch_end"
    try:
        connector.epoch_end_reached()
        yield
        connector.on_epoch_end()
        connector.update_train_epoch_metrics()
    finally:
        module._current_fx_name = hook
        progress.completed += 1
        loop._batches_that_stepped += 1


class MeasuresAtEpochEnds(Callback, ABC):
    """The hooks of a callback that measures at the end of epochs; what it measures is ``_measure``.

    Attributes:
        ends: the epochs.
        weights: on which weights of the network: the ``"current"`` ones, or those that a ``WeightAveraging`` of the
            Trainer validates and saves.
    """

    ends: EpochEnds
    weights: WhichWeights

    @abstractmethod
    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of such an epoch, on all processes, with these weights in the network."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.begin()
        if self.weights == "averaged":
            refuse_no_average(trainer, self)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ends.is_due(trainer):
            self.ends.note(trainer)
            with with_weights(trainer, pl_module, self.weights):
                self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.ends.missed(trainer):
            return
        if self.weights == "current" and holds_average(trainer, self):
            rank_zero_warn(
                f"{self.state_key}: what ended the run was not known at the end of the last epoch, and the callback "
                "that averages weights has put the average into the module since: the last values are those of the "
                "averaged weights. List that callback last to have those of the current ones."
            )
        with back_in_last_epoch(trainer, pl_module), with_weights(trainer, pl_module, self.weights):
            self._measure(trainer, pl_module)
