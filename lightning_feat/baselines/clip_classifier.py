"""Classification of images by the names of the classes, with a CLIP: zero-shot, or tuned on a few images of each class.

Shapes: N images, C classes, T templates, L tokens of a text, E features.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lightning_feat.baselines.classifier import Default, describe
from lightning_feat.baselines.clip import load_small_clip
from lightning_feat.baselines.clip_tokenizer import (
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    Tokenizer,
    import_open_clip,
    import_transformers,
)

Source = Literal["open_clip", "huggingface", "small"]


class ClipClassifier(LightningModule):
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
        lr: learning rate of the default optimizer after the warm-up.
        momentum: of the default optimizer.
        weight_decay: of the default optimizer.
        warmup_epochs: number of epochs at
        warmup_lr: this rate.
        grad_checkpointing: compute the blocks of both towers again in the backward pass, to save memory: text features
            of many classes need much. Not for Hugging Face, whose models do so in train mode only.

    Raises:
        ValueError: for arguments that do not fit, an unknown model, or a name in ``trainable`` that is not in ``clip``.
        ModuleNotFoundError: if the extra is not installed.
    """

    clip: Any
    tokenizer: Tokenizer

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        novel_class_names: Sequence[str] | None = None,
        source: Source = "open_clip",
        model: str = "ViT-B-16",
        pretrained: str | None = None,
        template: str | Sequence[str] = "a photo of a {}.",
        trainable: Sequence[str] = (),
        lr: float = 0.0035,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 1,
        warmup_lr: float = 1e-5,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(lr, momentum, weight_decay, warmup_epochs, warmup_lr) < 0:
            raise ValueError(
                f"{lr=}, {momentum=}, {weight_decay=}, {warmup_epochs=} and {warmup_lr=}: none can be negative."
            )
        templates = (template,) if isinstance(template, str) else tuple(template)
        if not templates or not all("{}" in each for each in templates):
            raise ValueError(f"template={template!r}: give a sentence, or several, with {{}} for the class name.")
        class_names, novel_class_names, trainable = _plain(class_names), _plain(novel_class_names), list(trainable)
        template, model = template if isinstance(template, str) else list(template), str(model)
        self.save_hyperparameters()
        self.template, self.templates, self.trainable = template, templates, trainable
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.warmup_epochs, self.warmup_lr = warmup_epochs, warmup_lr
        self.clip, self.tokenizer = load_clip(source, model, pretrained)
        self.is_huggingface = not hasattr(self.clip, "encode_text")
        if grad_checkpointing:
            if self.is_huggingface:
                raise ValueError("grad_checkpointing needs source='open_clip' or 'small': see the docstring.")
            self.clip.set_grad_checkpointing(True)
        self._freeze()
        self._class_names: tuple[str, ...] = ()
        self.novel_class_names: list[str] = []
        self._tokens: dict[tuple[str, ...], Tensor] = {}  # by class names, as is
        self._text_features: dict[tuple[str, ...], Tensor] = {}
        if class_names is not None:
            self.set_classes(class_names)
        if novel_class_names is not None:
            self.novel_class_names = list(_distinct(novel_class_names))
        self.val_accuracy = MeanMetric()
        self.base_accuracy, self.novel_accuracy = MeanMetric(), MeanMetric()
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_pre_hook(_fill_in_frozen)
        self.train()  # Lightning does not call it

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not self._class_names:
            names = getattr(data, "class_names", None) or getattr(data, "classes", None)
            if not names:
                raise ValueError("class_names are missing: give them, or a datamodule with class_names.")
            self.set_classes(names)
            self.novel_class_names = self.novel_class_names or list(getattr(data, "novel_class_names", None) or ())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that logits are for, in their order."""
        if not self._class_names:
            raise RuntimeError("there are no class names yet: give class_names, or call set_classes.")
        return list(self._class_names)

    @property
    def tokens(self) -> Tensor:
        """Token ids of all classes in the first template, then in the next: ``(T * C, L)`` int64."""
        names = tuple(self.class_names)
        if names not in self._tokens:
            self._tokens[names] = self.tokenizer(
                [each.replace("{}", name) for each in self.templates for name in names]
            )
        if self._tokens[names].device != self.device:
            self._tokens[names] = self._tokens[names].to(self.device)
        return self._tokens[names]

    def set_classes(self, names: Sequence[str]) -> None:
        """From now on logits are for these classes."""
        self._class_names = _distinct(names)

    @contextmanager
    def classes(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block logits are for these classes."""
        before = self._class_names
        self.set_classes(names)
        try:
            yield
        finally:
            self._class_names = before

    def encode_image(self, images: Tensor) -> Tensor:
        """What the image tower makes of images: ``(N, E)``, not normalised."""
        if not self.is_huggingface:
            features: Tensor = self.clip.encode_image(images)
            return features
        projected: Tensor = self.clip.visual_projection(self.clip.vision_model(pixel_values=images).pooler_output)
        return projected

    def encode_text(self, ids: Tensor) -> Tensor:
        """What the text tower makes of token ids ``(N, L)``: ``(N, E)``, not normalised."""
        if not self.is_huggingface:
            features: Tensor = self.clip.encode_text(ids)
            return features
        projected: Tensor = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return projected

    def image_features(self, images: Tensor) -> Tensor:
        """Features of images ``(N, E)``, not normalised."""
        return self.encode_image(images)

    def text_features(self, fresh: bool = False) -> Tensor:
        """Features of the classes ``(C, E)``, not normalised; with several templates the mean of normalised ones.

        Args:
            fresh: neither use features that were kept nor keep these, for a pass that changes the tower for a moment.
        """
        names = tuple(self.class_names)
        run = self._trainer  # outside a Trainer nobody says when what was kept is old
        evaluating = run is not None and (run.evaluating or run.sanity_checking or run.predicting)
        training = run is not None and run.training and self.training
        if (evaluating or training) and not fresh and names in self._text_features:
            return self._text_features[names]
        features = self.encode_text(self.tokens)
        if len(self.templates) > 1:
            features = normalize(features.float(), dim=-1).unflatten(0, (len(self.templates), -1)).mean(0)
        trains_nothing = training and torch.is_grad_enabled() and not features.requires_grad
        if (evaluating or trains_nothing) and not fresh:
            self._text_features[names] = features
        return features

    def logits_of(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosines ``(N, C)`` float32 of features ``(N, E)`` and ``(C, E)``, times the temperature that CLIP learned."""
        # The softmax is sharp, a hundred times the cosine: in 16 bits the classes would tie.
        with torch.autocast(self.device.type, enabled=False):
            cosine_NC = normalize(image_features.float(), dim=-1) @ normalize(text_features.float(), dim=-1).T
            logits: Tensor = self.clip.logit_scale.float().exp() * cosine_NC
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` of images for the current classes."""
        return self.logits_of(self.image_features(images), self.text_features())

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
        self._forget()
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

    def train(self, mode: bool = True) -> "ClipClassifier":
        super().train(mode)
        self.clip.eval()
        for name in self.trainable:
            part = _find(self.clip, name)
            if isinstance(part, nn.Module):
                part.train(mode)
        return self

    def on_fit_start(self) -> None:
        if not any(p.requires_grad for each in self.trainer.optimizers for g in each.param_groups for p in g["params"]):
            raise RuntimeError(
                "nothing trains: both towers are frozen. Add a callback that brings prompts or an adapter, or say what "
                "of the CLIP trains: trainable=['visual.ln_post'] for instance."
            )

    def on_train_epoch_start(self) -> None:
        self._forget()

    def on_test_epoch_start(self) -> None:
        self._forget()
        self.base_accuracy.reset()
        self.novel_accuracy.reset()

    # Before and after: features made in inference mode are of no use to training, and those of training may be old.
    on_validation_epoch_start = on_validation_epoch_end = on_train_epoch_start
    on_predict_epoch_start = on_predict_epoch_end = on_train_epoch_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "hyper_parameters" in checkpoint:
            names = {"class_names": list(self._class_names), "novel_class_names": list(self.novel_class_names)}
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], **names}

    @Default
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

    def _freeze(self) -> None:
        self.clip.requires_grad_(False).eval()
        for name in self.trainable:
            part = _find(self.clip, name)
            if part is None:
                near = ", ".join(child for child, _ in self.clip.named_children())
                raise ValueError(
                    f"trainable={name!r} is neither a submodule nor a parameter of clip, which has {near}."
                )
            part.requires_grad_(True)

    def _forget(self) -> None:
        self._text_features.clear()

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


def load_clip(source: Source, model: str, pretrained: str | None = None) -> tuple[nn.Module, Tokenizer]:
    """A CLIP on the CPU in float32, and its tokenizer; see ``ClipClassifier`` for the arguments."""
    if pretrained is not None and source != "open_clip":
        raise ValueError(f"pretrained={pretrained!r} is for source='open_clip' alone: {source!r} takes all from model.")
    if source == "small":
        return load_small_clip(model)
    if source == "huggingface":
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"{model!r} is no folder with a config.json: give one that save_pretrained has written.")
        network: nn.Module = import_transformers().CLIPModel.from_pretrained(model, local_files_only=True)
        length = int(network.config.text_config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        return network.float(), HuggingFaceTokenizer(model, length)
    if source != "open_clip":
        raise ValueError(f"source={source!r}: choose 'open_clip', 'huggingface' or 'small'.")
    open_clip = import_open_clip()
    if ":" not in model and model not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {model!r}: see open_clip.list_models().")
    return open_clip.create_model(model, pretrained=pretrained), OpenClipTokenizer(model)


def _plain(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else [*_distinct(names)]


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class names must be a list of strings, got {names!r}.")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"class names must be two at least, and each another: got {list(names)}.")
    return tuple(names)


def _find(clip: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    parts = {**dict(clip.named_parameters()), **dict(clip.named_modules())}
    del parts[""]
    return parts.get(name)


def _drop_frozen(module: ClipClassifier, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(module):
        state_dict.pop(f"{prefix}clip.{name}", None)


def _fill_in_frozen(module: ClipClassifier, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = module.clip.state_dict()
    for name in _frozen(module):
        if name in own:
            state_dict.setdefault(f"{prefix}clip.{name}", own[name])


def _frozen(module: ClipClassifier) -> list[str]:
    """Names in the state dict of ``clip`` of all that does not train."""
    live = {name for name, parameter in module.clip.named_parameters() if parameter.requires_grad}
    trained = tuple(f"{name}." for name in module.trainable)  # buffers of what trains belong to it
    return [name for name in module.clip.state_dict() if name not in live and not name.startswith(trained)]
