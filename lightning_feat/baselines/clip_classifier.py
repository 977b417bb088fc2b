"""Classification of images by the names of the classes, with a CLIP: zero-shot, or tuned on a few images of each class.

Shapes: N images, C classes, T templates, L tokens of a text, E features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lightning_feat.baselines.baseline import default_optimizer
from lightning_feat.baselines.classifier import describe
from lightning_feat.baselines.clip_sources import Source
from lightning_feat.baselines.named_classes import NamedClasses, distinct
from lightning_feat.joints.arguments import checked_values


class ClipClassifier(NamedClasses):
    """Compares the features of images with those of their classes' names; both towers are frozen, unless told
    otherwise.

    What is to be learned comes in from outside. Prompts hook into the towers, the submodules of ``clip``; an adapter
    stands around ``image_features`` or ``text_features``; the parameters of both join the optimizer, whose one group is
    empty if nothing of ``clip`` trains. A frozen tower is in eval mode always, and neither in the state dict nor in a
    checkpoint: loading builds it again from its source.

    Text features are computed in each training step if they carry a gradient, else once in each epoch; in evaluation
    once in each pass over a loader's classes.

    Batches begin with images, prepared as the image tower wants them, and targets ``(N,)``. Logs ``train/loss``,
    ``val/loss`` and ``val/accuracy``, and in the test ``test/base``, the accuracy on the first loader. A second loader
    has images of the novel classes, is classified among these, and gives ``test/novel`` and ``test/harmonic_mean``.

    The default optimizer is that of RESTORE and MaPLe: SGD with momentum, tuned there for batches of four images, and
    for each epoch a learning rate: small in the first, then on a half cosine that ends a little above zero.

    Args:
        class_names: of the classes to train on, by target. None takes ``class_names`` of the datamodule, or
            ``classes``, and its ``novel_class_names``.
        novel_class_names: of the classes in the second test loader.
        source: where the CLIP comes from: ``"open_clip"`` or ``"huggingface"``, which need
            ``pip install "lightning-feat[clip]"``, or ``"small"``, a ``SmallClip``.
        model: name in open_clip; folder of a ``CLIPModel`` and its tokenizer, as ``save_pretrained`` writes it; or path
            of a checkpoint of ``SmallClipPretraining``.
        pretrained: for open_clip alone: a tag, which it downloads, or the path of a checkpoint; None draws random
            weights.
        template: the sentence around a class name, with ``{}`` for it. With several, a class has the mean of their
            features, each of length one.
        trainable: names within ``clip`` of what trains, submodules or parameters: ``["visual.ln_post"]``. A submodule
            is then in train mode while training.
        lr: learning rate of the default optimizer after the warm-up; None for 0.0035.
        momentum: of the default optimizer; None for 0.9.
        weight_decay: of the default optimizer; None for 0.0005.
        warmup_epochs: of the default optimizer, number of epochs (None for one) at
        warmup_lr: this rate; None for 0.00001.
        grad_checkpointing: compute the blocks of both towers again in the backward pass, to save memory: text features
            of many classes need much. Not for Hugging Face, whose models do so in train mode only.

    Raises:
        ValueError: for arguments that do not fit, an unknown model, or a name in ``trainable`` that is not in ``clip``.
        ModuleNotFoundError: if the extra is not installed.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        novel_class_names: Sequence[str] | None = None,
        source: Source = "open_clip",
        model: str = "ViT-B-16",
        pretrained: str | None = None,
        template: str | Sequence[str] = "a photo of a {}.",
        trainable: Sequence[str] = (),
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        warmup_epochs: int | None = None,
        warmup_lr: float | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        checked_values(ClipClassifier.__init__, locals(), type(self).__name__)
        if min(value or 0 for value in (lr, momentum, weight_decay, warmup_epochs, warmup_lr)) < 0:
            raise ValueError(
                f"{lr=}, {momentum=}, {weight_decay=}, {warmup_epochs=} and {warmup_lr=}: none can be negative."
            )
        class_names = None if class_names is None else list(distinct(class_names))
        novel_class_names = None if novel_class_names is None else list(distinct(novel_class_names))
        templates = (template,) if isinstance(template, str) else tuple(template)
        super().__init__(source, str(model), pretrained, templates, trainable, grad_checkpointing)
        template, model, trainable = template if isinstance(template, str) else list(template), str(model), [*trainable]
        self.save_hyperparameters()
        self.template = template
        self.lr, self.warmup_lr = 0.0035 if lr is None else lr, 1e-5 if warmup_lr is None else warmup_lr
        self.momentum = 0.9 if momentum is None else momentum
        self.weight_decay = 5e-4 if weight_decay is None else weight_decay
        self.warmup_epochs = 1 if warmup_epochs is None else warmup_epochs
        self.novel_class_names: list[str] = novel_class_names or []
        if class_names is not None:
            self.set_classes(class_names)
        self.val_accuracy = MeanMetric()
        self.base_accuracy, self.novel_accuracy = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not self._class_names:
            names = getattr(data, "class_names", None) or getattr(data, "classes", None)
            if not names:
                raise ValueError("class_names are missing: give them, or a datamodule with class_names.")
            self.set_classes(names)
            self.novel_class_names = self.novel_class_names or list(getattr(data, "novel_class_names", None) or ())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = self._images_and_targets(batch, batch_idx)
        loss = cross_entropy(self(images), targets)
        self._log_mean("train/loss", loss, len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = self._images_and_targets(batch, batch_idx)
        logits = self(images)
        self._log_mean("val/loss", cross_entropy(logits, targets), len(images))
        self.val_accuracy.update((logits.argmax(1) == targets).float())
        self.log("val/accuracy", self.val_accuracy, on_epoch=True, prog_bar=True, batch_size=len(images))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx > 1 or (dataloader_idx and not self.novel_class_names):
            raise ValueError(
                f"there are {dataloader_idx + 1} test loaders and {len(self.novel_class_names)} novel_class_names: the "
                "first loader is of the base classes, the second of the novel ones, which must have names."
            )
        with self.classes(self.novel_class_names if dataloader_idx else self.class_names):
            images, targets = self._images_and_targets(batch, batch_idx)
            right = (self(images).argmax(1) == targets).float()
        (self.novel_accuracy if dataloader_idx else self.base_accuracy).update(right)

    def on_test_epoch_end(self) -> None:
        self.forget_text_features()
        base = self.base_accuracy.compute()
        # compute() agrees on all processes already; sync_dist only spares the reader a warning from Lightning.
        self.log("test/base", base, sync_dist=True)
        if self.novel_accuracy.update_called:
            novel = self.novel_accuracy.compute()
            self.log("test/novel", novel, sync_dist=True)
            both = (base + novel).clamp(min=torch.finfo(base.dtype).tiny)  # zero, not nan, if nothing is right
            self.log("test/harmonic_mean", 2 * base * novel / both, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Logits ``(N, C)`` of a batch of images, alone or followed by other things."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return logits

    def on_fit_start(self) -> None:
        if not any(p.requires_grad for each in self.trainer.optimizers for g in each.param_groups for p in g["params"]):
            raise RuntimeError(
                "nothing trains: both towers are frozen. Add a callback that brings prompts or an adapter, or say what "
                "of the CLIP trains: trainable=['visual.ln_post'] for instance."
            )

    def on_test_epoch_start(self) -> None:
        self.forget_text_features()
        self.base_accuracy.reset()
        self.novel_accuracy.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "hyper_parameters" in checkpoint:
            names = {"class_names": list(self._class_names), "novel_class_names": list(self.novel_class_names)}
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], **names}

    @default_optimizer("lr", "momentum", "weight_decay", "warmup_epochs", "warmup_lr")
    def configure_optimizers(self) -> dict[str, Any]:
        """SGD on what trains of ``clip``, one group, perhaps empty; its rate constant in the warm-up, then on a cosine.

        The rate after warm-up epoch W of M is ``lr * (1 + cos(pi * (epoch - W) / M)) / 2``, as Dassl steps its schedule
        (from memory of its code). Without a last epoch, ``lr``.
        """
        own = [p for p in self.clip.parameters() if p.requires_grad]
        # A group in a dict may be empty: a callback appends to it what it brings.
        groups: list[dict[str, Any]] = [{"params": own}]
        optimizer = SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        last = -1 if self._trainer is None else self.trainer.max_epochs or -1
        warm, warm_factor = self.warmup_epochs, self.warmup_lr / self.lr if self.lr else 1.0

        def factor(epoch: int) -> float:
            if epoch < warm:
                return warm_factor
            return (1 + math.cos(math.pi * (epoch - warm) / last)) / 2 if last > 0 else 1.0

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "epoch"}}

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
        if batch_idx == 0 and not targets.is_floating_point() and int(targets.max()) >= len(self._class_names):
            raise ValueError(
                f"there are {len(self._class_names)} class names, but a target is {int(targets.max())}: targets are "
                "class indices from 0, so name every class."
            )
        return images, targets
