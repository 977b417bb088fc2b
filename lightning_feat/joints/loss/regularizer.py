from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_feat.joints.arguments import checked
from lightning_feat.joints.loss.engine import add_loss_term, remove_loss_term
from lightning_feat.joints.loss.terms import LossTerm
from lightning_feat.joints.module.brings_parameters import BringsParameters


class Regularizer(BringsParameters):
    """Add one loss term to any LightningModule while it is fitted, or several that ``terms`` of a subclass lists.
    Subclasses build the terms; this class brings them in and out.
    """

    @checked
    def __init__(self, term: LossTerm) -> None:
        self.term = term

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.term.key}]"

    def terms(self) -> list[LossTerm]:
        """What is added to the loss; nothing where the terms are yet to be made."""
        return [self.term]

    def brought(self) -> tuple[str, nn.Module] | None:
        own = [(term.key, term.parameters) for term in self.terms() if term.parameters is not None]
        return own[0] if own else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.add_terms(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.remove_terms(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.remove_terms(pl_module)  # after an exception Lightning does not call teardown

    def add_terms(self, pl_module: LightningModule) -> None:
        """Add all terms to the loss of ``pl_module``. A second time changes nothing."""
        for term in self.terms():
            add_loss_term(pl_module, term)

    def remove_terms(self, pl_module: LightningModule) -> None:
        """Undo ``add_terms``."""
        for term in self.terms():
            remove_loss_term(pl_module, term)
