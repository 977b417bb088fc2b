"""Contrastive pre-training of a small CLIP on images and captions.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.

Shapes: N images or texts, E features.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_feat.baselines.baseline import Baseline, default_optimizer
from lightning_feat.baselines.classifier import describe
from lightning_feat.baselines.clip import SmallClip
from lightning_feat.baselines.clip_tokenizer import WordTokenizer
from lightning_feat.joints.arguments import checked_values


def contrastive_loss(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """Mean of two cross-entropies: which text belongs to an image, and which image to a text.

    Args:
        image_features: ``(N, E)``, of length one; row i belongs to row i of
        text_features: ``(N, E)``, of length one.
        scale: factor of the cosines.

    Returns:
        Scalar; log N where nothing is told apart.
    """
    logits_NN = scale * image_features @ text_features.T
    own_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (cross_entropy(logits_NN, own_N) + cross_entropy(logits_NN.T, own_N)) / 2


class SmallClipPretraining(Baseline):
    """Trains a ``SmallClip``, as ``clip``, on batches that begin with images and as many captions in words.

    With several processes the loss compares each image with the captions of all, as one process with the whole batch
    would; their batches must be of one size. Logs ``train/loss``, ``train/logit_scale``, ``val/loss`` and
    ``val/accuracy``, the share of images whose own caption, or one with the same words, comes first in its batch.

    The default optimizer is AdamW, with decay on matrices alone, its rate on a line up and a half cosine down to zero.
    A checkpoint holds the vocabulary: ``load_small_clip`` needs its path and nothing else.

    Args:
        words: vocabulary of ``tokenizer``, a ``WordTokenizer``.
        context_length: longest caption in tokens, with start and end.
        image_size: height and width of the images in pixels.
        patch_size: height and width of a patch.
        embed_dim: width of the features.
        width: of both towers.
        layers: blocks of each tower.
        heads: attention heads in each block.
        lr: largest learning rate of the default optimizer; None for 0.001.
        weight_decay: of the default optimizer; None for 0.1.
        warmup_steps: of the default optimizer, steps to the largest rate; None for 50.
    """

    def __init__(
        self,
        words: Sequence[str],
        context_length: int = 16,
        image_size: int = 32,
        patch_size: int = 8,
        embed_dim: int = 64,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        lr: float | None = None,
        weight_decay: float | None = None,
        warmup_steps: int | None = None,
    ) -> None:
        checked_values(SmallClipPretraining.__init__, locals(), type(self).__name__)
        super().__init__()
        if min(lr or 0, weight_decay or 0, warmup_steps or 0) < 0:
            raise ValueError(f"{lr=}, {weight_decay=} and {warmup_steps=}: none can be negative.")
        self.tokenizer = WordTokenizer(words, context_length)
        words = list(self.tokenizer.words)  # plain and sorted, as a checkpoint should hold them
        self.save_hyperparameters()
        self.lr = 1e-3 if lr is None else lr
        self.weight_decay = 0.1 if weight_decay is None else weight_decay
        self.warmup_steps = 50 if warmup_steps is None else warmup_steps
        tower = (width, layers, heads)
        self.clip = SmallClip(
            self.tokenizer.vocab_size, context_length, image_size, patch_size, embed_dim, *tower, *tower
        )

    def forward(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of images and of captions, each ``(N, E)`` and of length one."""
        ids = self.tokenizer(captions).to(images.device)
        image_features, text_features, _ = self.clip(images, ids)
        return image_features, text_features

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image_features, text_features = self(*self._images_and_captions(batch))
        if self.trainer.world_size > 1:
            # With gradient: each process computes the loss of all pairs, and the mean that DDP takes of the gradients
            # is the gradient of that loss.
            gathered: Any = self.all_gather((image_features, text_features), sync_grads=True)
            image_features, text_features = (features.flatten(0, 1) for features in gathered)
        scale = self.clip.logit_scale.exp()
        loss = contrastive_loss(image_features, text_features, scale)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(image_features))
        self.log("train/logit_scale", scale, batch_size=1)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.clip.logit_scale.data.clamp_(0, math.log(100))  # as Radford et al. do, lest training become unstable

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, captions = self._images_and_captions(batch)
        image_features, text_features = self(images, captions)
        logged: dict[str, Any] = {"on_epoch": True, "prog_bar": True, "sync_dist": True, "batch_size": len(images)}
        self.log("val/loss", contrastive_loss(image_features, text_features, self.clip.logit_scale.exp()), **logged)
        first = (image_features @ text_features.T).argmax(1).tolist()
        right = [captions[found] == own for found, own in zip(first, captions, strict=True)]
        self.log("val/accuracy", torch.tensor(right, dtype=torch.float32, device=self.device).mean(), **logged)

    @default_optimizer("lr", "weight_decay", "warmup_steps")
    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, its rate rising on a line and falling on a half cosine to zero, where the length of the run is
        known.
        """
        matrices = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        steps = math.inf if self._trainer is None else self.trainer.estimated_stepping_batches
        warm = self.warmup_steps

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            done = (step - warm) / max(steps - warm, 1) if 0 < steps < math.inf else 0.0
            return (1 + math.cos(math.pi * min(done, 1.0))) / 2

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def _images_and_captions(self, batch: Any) -> tuple[Tensor, list[str]]:
        if (
            not isinstance(batch, (tuple, list))
            or len(batch) < 2
            or not torch.is_tensor(batch[0])
            or not isinstance(batch[1], (tuple, list))
            or not all(isinstance(caption, str) for caption in batch[1])
        ):
            raise ValueError(
                f"{type(self).__name__} needs batches that begin with images and a list of captions, got "
                f"{describe(batch)}: let the data set give (image, caption in words)."
            )
        return batch[0], list(batch[1])


def load_small_clip(path: str | Path) -> tuple[SmallClip, WordTokenizer]:
    """The model and the tokenizer in a checkpoint of ``SmallClipPretraining``, on the CPU.

    Raises:
        ValueError: if the file is not there, or not of that kind.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r}: write one with SmallClipPretraining.")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if "words" not in stored.get("hyper_parameters", {}):
        raise ValueError(f"{str(path)!r} is no checkpoint of SmallClipPretraining: it holds no vocabulary.")
    module = SmallClipPretraining(**stored["hyper_parameters"])
    module.load_state_dict(stored["state_dict"])
    return module.clip, module.tokenizer
