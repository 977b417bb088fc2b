from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_feat.functional.common.looks import without_looking
from lightning_feat.joints.features.at_once import try_all
from lightning_feat.joints.features.batches import TargetKey, class_indices, mask_of, targets_of
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.layers.grassmann import GrassmannLinear
from lightning_feat.metrics.transfer import ClassSeparation, WithinClassVariability


class FeatureSpread:
    """How the features that a head reads spread, over an epoch: their separation, and their variability.

    Args:
        label: dotted name of the head.
        head: its layer.
        pooling: see ``GrassmannMonitor``, and there the next three.
        target_key: see there.
        ignore_index: see there.
        mask_key: see there.
        syncs: whether the variability is that of all processes when it is computed; else it is given samples of all.
        device: of the module.

    Attributes:
        tap: on the inputs of the head; to be attached, and removed.
        r2: the separation.
        variability: of pairs of one class.
    """

    def __init__(
        self,
        label: str,
        head: GrassmannLinear,
        pooling: Pooling | None,
        target_key: TargetKey,
        ignore_index: int,
        mask_key: TargetKey,
        syncs: bool,
        device: torch.device,
    ) -> None:
        self.tap = FeatureTap(label, "input", pooling)
        self.r2 = ClassSeparation(head.num_classes, head.in_features).to(device)
        self.variability = WithinClassVariability(head.num_classes, sync_on_compute=syncs).to(device)
        self._label, self._pooling = label, pooling
        self._target_key, self._ignore_index, self._mask_key = target_key, ignore_index, mask_key
        self._heard = torch.zeros(())

    def begin_epoch(self) -> None:
        """Forget what was heard."""
        self._heard = torch.zeros(())
        for metric in (self.r2, self.variability):
            metric.reset()

    def take(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Features of a batch that the tap has heard, targets (zero where a sample is left out), and which are left
        out.
        """
        mask, found = try_all(
            lambda: mask_of(batch, self._mask_key), lambda: targets_of(batch, self._target_key), self.tap.check
        )[:2]
        features = self.tap.take(mask)
        where = f"the targets for layer {self._label}"
        targets = class_indices(found, len(features), where, self._pooling != "tokens")
        targets = targets.to(features.device)
        left_out = targets == self._ignore_index
        if self._pooling == "tokens" and mask is not None:
            left_out |= ~mask.to(features.device).flatten()
        self._heard = self._heard.to(left_out.device) + (~left_out).sum()
        return features, targets.masked_fill(left_out, 0), left_out

    def update(self, features: Tensor, targets: Tensor, left_out: Tensor) -> None:
        """Add what ``take`` gave, without a look at the device."""
        with without_looking():
            self.r2.update(features, targets, left_out)
            self.variability.update(features, targets, left_out)

    def lost(self, trainer: Trainer) -> tuple[float, float]:
        """Over all processes, samples that were not finite, and all that were heard."""
        numbers = torch.stack([self.r2.nonfinite, self._heard.to(self.r2.nonfinite)])
        if trainer.world_size > 1:
            numbers = trainer.strategy.reduce(numbers, reduce_op="sum")  # type: ignore[assignment]
        return float(numbers[0]), float(numbers[1])
