"""The hooks of a callback that brings parameters along."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_feat.joints.module import own_checkpoints
from lightning_feat.joints.module.own_parameters import NAME, keep_in_optimizers
from lightning_feat.joints.run.averaging import refuse_averaging_before, refuse_other_copies

_WATCHED_BATCHES = 4  # of each epoch: callbacks that thaw layers make groups where an epoch or a fit begins


class BringsParameters(Callback, ABC):
    """Keeps own parameters in checkpoints, in averages and in the optimizer. Subclasses say which there are, and adopt
    and release them.
    """

    @abstractmethod
    def brought(self) -> tuple[str, nn.Module] | None:
        """The key and the module that was adopted under it; None if there is none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.brought() is not None:
            refuse_averaging_before(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.brought() is not None:
            refuse_other_copies(trainer, pl_module, NAME, type(self).__name__)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx < _WATCHED_BATCHES and self.brought() is not None:
            keep_in_optimizers(trainer.optimizers, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if (brought := self.brought()) is not None:
            own_checkpoints.save(trainer, checkpoint, *brought)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if (brought := self.brought()) is not None:
            own_checkpoints.load(trainer, checkpoint, *brought)
