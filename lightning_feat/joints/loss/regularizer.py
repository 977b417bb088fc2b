from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_feat.joints.loss.engine import add_loss_term, remove_loss_term
from lightning_feat.joints.loss.terms import LossTerm
from lightning_feat.joints.module.brings_parameters import BringsParameters


class Regularizer(BringsParameters):
    """Add one loss term to any LightningModule while it is fitted. Subclasses build the term; this class brings it in
    and out.
    """

    def __init__(self, term: LossTerm) -> None:
        self.term = term

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.term.key}]"

    def brought(self) -> tuple[str, nn.Module] | None:
        return None if self.term.parameters is None else (self.term.key, self.term.parameters)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            add_loss_term(pl_module, self.term)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        remove_loss_term(pl_module, self.term)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        remove_loss_term(pl_module, self.term)  # after an exception Lightning does not call teardown
