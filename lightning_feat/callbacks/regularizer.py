from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_feat import own_parameters
from lightning_feat.batches import TargetKey
from lightning_feat.loss_engine import add_loss_term, remove_loss_term
from lightning_feat.loss_terms import FeatureLossTerm, LossTerm, WeightSchedule
from lightning_feat.taps import FeatureTap, Pooling, Read


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


class FeatureRegularizer(Regularizer):
    """Add any function of the features of a layer to the loss, with the right scale under accumulation, AMP and DDP.

    Logs ``<name>/loss/<layer>``, the value without weight, and ``<name>/share/<layer>``, its weighted share of the
    loss, as means over each epoch. The parameters of ``loss``, if it is an ``nn.Module``, are trained by the user's
    optimizer; a checkpoint keeps them apart from the user's, so that runs with and without this callback can resume
    from one another.

    Args:
        loss: ``loss(features)`` or ``loss(features, targets)`` giving a scalar; a function or an ``nn.Module``.
        name: first part of the logged names.
        weight: factor of the term, a number or a ``WeightSchedule``.
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of that layer.
        pooling: how features that are not ``(N, D)`` become so, see ``lightning_feat.taps.pool``.
        target_key: where a batch keeps the class indices, see ``lightning_feat.batches.targets_of``.
        ignore_index: samples with this target are left out.
        backward_index: with manual optimization, which ``manual_backward`` of a step the term joins, from 0.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        name: str,
        weight: float | WeightSchedule = 1.0,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        backward_index: int = 0,
    ) -> None:
        tap = FeatureTap(layer, read, pooling, keep_graph=True)
        super().__init__(FeatureLossTerm(loss, name, tap, weight, target_key, ignore_index, backward_index))
