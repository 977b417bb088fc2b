from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_feat.joints.loss.engine import add_loss_term, remove_loss_term
from lightning_feat.joints.loss.terms import LossTerm
from lightning_feat.joints.module import own_parameters


class Regularizer(Callback):
    """Add one loss term to any LightningModule while it is fitted. Subclasses build the term; this class brings it in
    and out.
    """

    def __init__(self, term: LossTerm) -> None:
        self.term = term

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.term.key}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            add_loss_term(pl_module, self.term)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        remove_loss_term(pl_module, self.term)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        remove_loss_term(pl_module, self.term)  # after an exception Lightning does not call teardown

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.term.parameters is not None:
            own_parameters.save(trainer, checkpoint, self.term.key, self.term.parameters)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.term.parameters is not None:
            own_parameters.load(trainer, checkpoint, self.term.key, self.term.parameters)
