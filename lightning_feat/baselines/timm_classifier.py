"""Any network that timm knows by name, as a classifier."""

from difflib import get_close_matches
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_feat.baselines.classifier import Classifier


class TimmClassifier(Classifier):
    """A timm network, as ``network``, with the losses, accuracies and default optimizer of ``Classifier``.

    With mixup or cutmix a training batch is mixed once, before any callback sees it, and its targets become
    probabilities ``(N, C)`` float32. An image is mixed with its mirror place in the batch; of a batch of odd size the
    last image is left as it is, its target one-hot. Label smoothing comes on top. Mixing draws from NumPy's global
    generator, as timm does; ``seed_everything`` seeds it.

    Args:
        model_name: a name from ``timm.list_models()``, or ``hf-hub:...`` or ``local-dir:...``.
        num_classes: number of classes.
        pretrained: download weights. To load a checkpoint of ours without a download, give
            ``load_from_checkpoint(path, pretrained=False)``.
        in_chans: channels of the images.
        label_smoothing: share of each training target spread evenly over all classes.
        mixup_alpha: mixing shares are drawn from Beta(alpha, alpha), 0 for none (Zhang et al., "mixup", ICLR 2018).
        cutmix_alpha: the same for pasted rectangles (Yun et al., "CutMix", ICCV 2019); with both, each batch gets one
            of them by a fair coin.
        drop_rate: dropout before the classifier.
        model_kwargs: more arguments for ``timm.create_model``.
        lr: learning rate of the default optimizer at the start of the run; None for 0.05.
        weight_decay: of the default optimizer, on all parameters; None for 0.0005.
        cifar_stem: give a ResNet of timm the first layer usual for 32 x 32 pixels, a 3 x 3 convolution of stride 1 and
            no pooling (He et al., "Deep Residual Learning", CVPR 2016, on CIFAR): the last feature map is then 4 x 4
            and not 1 x 1. That convolution begins at random also where the rest is pretrained.

    Example:
        >>> module = TimmClassifier("test_resnet", num_classes=10, in_chans=1)
        >>> module(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        pretrained: bool = False,
        in_chans: int = 3,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        drop_rate: float = 0.0,
        model_kwargs: dict[str, Any] | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        cifar_stem: bool = False,
    ) -> None:
        super().__init__(
            num_classes,
            label_smoothing,
            lr=0.05 if lr is None else lr,
            weight_decay=5e-4 if weight_decay is None else weight_decay,
        )
        self.save_hyperparameters()
        import timm  # not above: it takes seconds, and those who want the perceptron do without
        from timm.data.mixup import Mixup

        if mixup_alpha < 0 or cutmix_alpha < 0:
            raise ValueError(f"{mixup_alpha=} and {cutmix_alpha=}: zero is none, and neither can be negative.")
        if ":" not in model_name and not timm.is_model(model_name):
            near = get_close_matches(model_name.split(".")[0], timm.list_models(), n=3)
            raise ValueError(
                f"timm {timm.__version__} has no model {model_name!r}: "
                f"{'did you mean ' + ' or '.join(near) + '?' if near else 'see timm.list_models().'}"
            )
        extra = {**({"drop_rate": drop_rate} if drop_rate else {}), **(model_kwargs or {})}
        self.network = timm.create_model(
            model_name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **extra
        )
        if cifar_stem:
            put_cifar_stem(self.network, model_name)
        self.mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=num_classes
        )
        self.mixup.mixup_enabled = bool(mixup_alpha or cutmix_alpha)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_chans, H, W)``."""
        logits: Tensor = self.network(images)
        return logits

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Not in training_step: that runs twice per batch under SAM, and would mix twice. Here callbacks, too, get the
        # targets that belong to the images.
        if not self.mixup.mixup_enabled or not self.trainer.training:
            return batch
        images, targets = self._images_and_targets(batch, batch_idx=0)
        if targets.is_floating_point():
            raise ValueError(
                f"mixup and cutmix need class indices (N,) as targets, got {targets.dtype} of shape "
                f"{tuple(targets.shape)}: switch them off, or let the data set give indices."
            )
        return type(batch)((*self._mix(images, targets), *batch[2:]))

    # Lightning would warn, in every run with a datamodule, that this is used: which is what one expects. This entry is
    # where it looks whether a hook is its own; the hook is called all the same.
    on_after_batch_transfer.__wrapped__ = LightningModule.on_after_batch_transfer  # type: ignore[attr-defined]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.mixup.mixup_enabled and not batch[1].is_floating_point():
            raise RuntimeError(
                "mixup_alpha or cutmix_alpha is set, but the batch came unmixed: the datamodule has its own "
                "on_after_batch_transfer, which Lightning calls instead. Do its work in on_before_batch_transfer."
            )
        return super().training_step(batch, batch_idx)

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) - len(images) % 2  # timm mixes pairs, in place
        mixed, soft = self.mixup(images[:even].clone(), targets[:even])
        if even == len(images):
            return mixed, soft
        last = torch.nn.functional.one_hot(targets[even:], self.num_classes).to(soft)
        return torch.cat([mixed, images[even:]]), torch.cat([soft, last])


def put_cifar_stem(network: nn.Module, model_name: str) -> None:
    """Replace the first convolution, 7 x 7 of stride 2, and the pooling after it, in place.

    Raises:
        ValueError: if the network does not begin so.
    """
    first = getattr(network, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not isinstance(getattr(network, "maxpool", None), nn.MaxPool2d):
        raise ValueError(
            f"cifar_stem replaces a 7 x 7 convolution and the max pooling after it, and {model_name!r} does not begin "
            "with these: take a plain ResNet, such as resnet18 or resnet34, or leave cifar_stem out."
        )
    conv = nn.Conv2d(first.in_channels, first.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm begins the others
    network.conv1, network.maxpool = conv, nn.Identity()
