"""What the baselines that classify share: loss, accuracy, and an optimizer for those who name none."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_feat.baselines.baseline import Baseline, default_optimizer
from lightning_feat.joints.arguments import checked


class Classifier(Baseline):
    """Trains a network on batches that begin with images and targets; anything after these is left alone.

    Targets are class indices ``(N,)``, or probabilities ``(N, C)`` in training. Logs, each over a whole epoch,
    ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy`` (top-1, a share of all samples).
    ``predict_step`` gives the logits. A subclass defines ``forward``, from images to logits ``(N, C)``.

    Args:
        num_classes: number of classes C.
        label_smoothing: share of each training target spread evenly over all classes.
        lr: learning rate of the default optimizer at the start of the run.
        weight_decay: of the default optimizer, on all parameters.
    """

    @checked
    def __init__(self, num_classes: int, label_smoothing: float, lr: float, weight_decay: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: a classifier tells at least two classes apart.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: give a share in [0, 1).")
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"{lr=} and {weight_decay=}: neither can be negative.")
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.lr, self.weight_decay = lr, weight_decay
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = self._images_and_targets(batch, batch_idx)
        loss = cross_entropy(self(images), targets, label_smoothing=self.label_smoothing)
        self._log_mean("train/loss", loss, len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", self.val_accuracy, batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", self.test_accuracy, batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Logits ``(N, C)`` of a batch of images, alone or followed by other things."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return logits

    @default_optimizer("lr", "weight_decay")
    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum 0.9, its learning rate on a half cosine to zero over the run, where its length is known."""
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        steps = math.inf if self._trainer is None else self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:  # no Trainer, as under Fabric, or a run without an end
            return {"optimizer": optimizer}
        scheduler = CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: Any, batch_idx: int) -> None:
        images, targets = self._images_and_targets(batch, batch_idx)
        logits = self(images)
        accuracy.update(logits, targets)
        self._log_mean(f"{stage}/loss", cross_entropy(logits, targets), len(images))
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))

    def _log_mean(self, name: str, loss: Tensor, batch_size: int) -> None:
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=batch_size)

    def _images_and_targets(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(map(torch.is_tensor, batch[:2])):
            raise ValueError(
                f"{type(self).__name__} needs batches that begin with images and targets, got "
                f"{describe(batch)}: let the data set give (image, target)."
            )
        images, targets = batch[0], batch[1]
        # Asking costs a synchronisation with the device, so the first batch speaks for all.
        if batch_idx == 0 and not targets.is_floating_point() and int(targets.max()) >= self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes}, but a target is {int(targets.max())}: targets are class indices from "
                "0, so set num_classes to one more than the largest."
            )
        return images, targets


def describe(batch: Any) -> str:
    """A batch in a few words, for an error."""
    if isinstance(batch, dict):
        return f"a dict with keys {sorted(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of ({', '.join(type(entry).__name__ for entry in batch)})"
    return f"a {type(batch).__name__}"
