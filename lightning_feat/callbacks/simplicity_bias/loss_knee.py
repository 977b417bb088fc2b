import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_feat.callbacks.simplicity_bias.slow_pass import Criterion, losses_of_each
from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.looks import without_looking
from lightning_feat.functional.simplicity_bias.epochs import knee_reached
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.taps import FeatureTap


class LossKnee:
    """Seeks the epoch from which the loss falls more slowly, in the logits of training as they pass.

    Args:
        logits: a tap on the classifier; who attaches it, removes it.
        criterion: the loss of each example, as for ``SlowPass``.
        target_key: where a batch keeps class indices.

    Attributes:
        losses: means over the training batches, by epoch; of an epoch that is resumed in its middle, over those since.
    """

    def __init__(self, logits: FeatureTap, criterion: Criterion | None, target_key: TargetKey) -> None:
        self.logits, self.criterion, self.target_key = logits, criterion, target_key
        self.losses: list[float] = []
        self._num_classes = 0
        self._summed = torch.zeros(2)  # losses of this epoch, and their number
        self._range = torch.zeros(2, dtype=torch.long)  # the largest class index so far, and minus the smallest

    def begin_epoch(self, device: torch.device) -> None:
        self._summed = torch.zeros(2, device=device)
        self._range = torch.zeros(2, dtype=torch.long, device=device)

    def listen(self) -> None:
        """From the start of a training batch."""
        self.logits.listen()

    def hold(self) -> None:
        """When the loss is there: the passes that follow it, as of SAM, are not heard."""
        self.logits.hold()

    def take(self, batch: Any) -> None:
        """At the end of a batch."""
        logits: Tensor = self.logits.take()
        self._num_classes = logits.shape[1]
        targets = class_indices(targets_of(batch, self.target_key), len(logits), "the targets").to(logits.device)
        known = targets
        if self.criterion is None and targets.numel() and not targets.is_floating_point():
            # Labels out of range are told at the end of the epoch; here they would stop the device.
            self._range = torch.maximum(self._range, torch.stack([targets.max(), -targets.min()]).to(self._range))
            known = targets.clamp(0, self._num_classes - 1)
        with without_looking():
            losses = losses_of_each(logits.float(), known, self.criterion)
        self._summed += torch.stack([losses.sum(), losses.new_full((), len(losses))])

    def reached(self, trainer: Trainer) -> bool:
        """At the end of an epoch: whether it was the knee, the same on all processes.

        Raises ``ValueError``, on all of them, where a label was out of range.
        """
        bounds = torch.cat([self._range, self._range.new_tensor([self._num_classes])])  # one may have had no batch
        highest, lowest, num_classes = trainer.strategy.reduce(bounds, reduce_op="max").tolist()
        if self.criterion is None and num_classes:
            check_target_range(torch.tensor([-lowest, highest]), num_classes)
        total, number = trainer.strategy.reduce(self._summed, reduce_op="sum").tolist()
        self.losses.append(total / max(number, 1.0))
        start = math.log(self._num_classes) if self.criterion is None else None
        return knee_reached(self.losses, trainer.max_epochs or 0, start=start)
