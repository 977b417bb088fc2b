from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_feat.callbacks.simplicity_bias.slow_pass import Criterion, losses_of_each
from lightning_feat.data.plan import PlanSampler
from lightning_feat.data.selection import Selection
from lightning_feat.joints.data.train_loader import one_train_loader
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.loss.terms import LossTerm, WeightSchedule

_NOTHING = (None, -1, torch.zeros(0))


class SlowLossTerm(LossTerm):
    """Counts the loss of slow examples ``factor`` times: the mean over a batch of what they have beyond one.

    Which examples a batch has is read off the plan of the epoch, as the order depends on nothing else.

    Args:
        layer: the classifier, whose output are the logits.
        factor: how often the loss of a slow example counts.
        criterion: gives the loss of each example; it should be that of the module.
        target_key: where a batch keeps class indices.
    """

    def __init__(self, layer: str | None, factor: int, criterion: Criterion | None, target_key: TargetKey) -> None:
        super().__init__("upsampling", 0.0, [FeatureTap(layer, "output", keep_graph=True, pools=False)])
        self.factor, self.criterion, self.target_key = factor, criterion, target_key
        self.slow: Tensor | None = None
        self._dealt: tuple[Any, int, Tensor] = _NOTHING  # a sampler, an epoch, and what this process sees in it

    def use(self, selection: Selection | None) -> None:
        """Count these from now on; None for none."""
        self.slow = None if selection is None else selection.slow
        self.weight = WeightSchedule(0.0 if selection is None else float(self.factor - 1))
        self._dealt = _NOTHING

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        logits = self.taps[0].take().float()
        targets = class_indices(targets_of(batch, self.target_key), len(logits), "the targets").to(logits.device)
        slow = self._slow_rows(module, len(logits)).to(logits.device)
        return (losses_of_each(logits, targets, self.criterion) * slow).mean()

    def _slow_rows(self, module: LightningModule, rows: int) -> Tensor:
        trainer = module.trainer
        loader = one_train_loader(trainer, None)
        sampler = loader.sampler
        if not isinstance(sampler, PlanSampler) or self.slow is None or not loader.batch_size:
            raise RuntimeError("the training loader has lost its plan: was it made anew by another callback?")
        if self._dealt[:2] != (sampler, sampler.epoch):
            self._dealt = (sampler, sampler.epoch, sampler.share())
        first = trainer.fit_loop.batch_idx * loader.batch_size
        index = self._dealt[2][first : first + loader.batch_size]
        if rows % max(len(index), 1):
            raise RuntimeError(f"a batch of {len(index)} examples has {rows} logits: use show='copies'.")
        return self.slow[index].float().repeat(rows // max(len(index), 1))
