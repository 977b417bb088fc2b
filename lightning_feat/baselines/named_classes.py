"""A CLIP as a LightningModule: which of it trains, and its logits for the names of classes.

Shapes: N images, C classes, T templates, L tokens of a text, E features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_feat.baselines.baseline import Baseline
from lightning_feat.baselines.clip_sources import Source, load_clip
from lightning_feat.baselines.clip_tokenizer import Tokenizer
from lightning_feat.joints.arguments import checked


class NamedClasses(Baseline):
    """Logits of images for the names of classes, by a CLIP as ``clip`` whose towers are frozen, unless told otherwise.

    A frozen tower is in eval mode always, and neither in the state dict nor in a checkpoint: loading builds it again
    from its source. Text features are computed in each training step if they carry a gradient, else once in each epoch;
    in evaluation once in each pass over a loader's classes.

    Args:
        source: where the CLIP comes from, see ``clip_sources.load_clip``; and there the next two.
        model: see there.
        pretrained: see there.
        templates: sentences around a class name, with ``{}`` for it.
        trainable: names within ``clip`` of what trains, submodules or parameters.
        grad_checkpointing: compute the blocks of both towers again in the backward pass.
    """

    clip: Any
    tokenizer: Tokenizer

    @checked
    def __init__(
        self,
        source: Source,
        model: str,
        pretrained: str | None,
        templates: Sequence[str],
        trainable: Sequence[str],
        grad_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.templates, self.trainable = tuple(templates), list(trainable)
        if not self.templates or not all("{}" in each for each in self.templates):
            raise ValueError(
                f"template={list(self.templates)}: give a sentence, or several, with {{}} for the class name."
            )
        self.clip, self.tokenizer = load_clip(source, model, pretrained)
        self.is_huggingface = not hasattr(self.clip, "encode_text")
        if grad_checkpointing:
            if self.is_huggingface:
                raise ValueError("grad_checkpointing needs source='open_clip' or 'small': see the docstring.")
            self.clip.set_grad_checkpointing(True)
        self._freeze()
        self._class_names: tuple[str, ...] = ()
        self._tokens: dict[tuple[str, ...], Tensor] = {}  # by class names, as is
        self._text_features: dict[tuple[str, ...], Tensor] = {}
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_pre_hook(_fill_in_frozen)
        self.train()  # Lightning does not call it

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
        self._class_names = distinct(names)

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

    def train(self, mode: bool = True) -> "NamedClasses":
        super().train(mode)
        self.clip.eval()
        for name in self.trainable:
            part = _find(self.clip, name)
            if isinstance(part, nn.Module):
                part.train(mode)
        return self

    def on_train_epoch_start(self) -> None:
        self.forget_text_features()

    # Before and after: features made in inference mode are of no use to training, and those of training may be old.
    on_validation_epoch_start = on_validation_epoch_end = on_train_epoch_start
    on_predict_epoch_start = on_predict_epoch_end = on_train_epoch_start

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

    def forget_text_features(self) -> None:
        """Compute them anew when they are asked for."""
        self._text_features.clear()


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, or a ``ValueError``."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class names must be a list of strings, got {names!r}.")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"class names must be two at least, and each another: got {list(names)}.")
    return tuple(names)


def _find(clip: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    parts = {**dict(clip.named_parameters()), **dict(clip.named_modules())}
    del parts[""]
    return parts.get(name)


def _drop_frozen(module: NamedClasses, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(module):
        state_dict.pop(f"{prefix}clip.{name}", None)


def _fill_in_frozen(module: NamedClasses, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = module.clip.state_dict()
    for name in _frozen(module):
        if name in own:
            state_dict.setdefault(f"{prefix}clip.{name}", own[name])


def _frozen(module: NamedClasses) -> list[str]:
    """Names in the state dict of ``clip`` of all that does not train."""
    live = {name for name, parameter in module.clip.named_parameters() if parameter.requires_grad}
    trained = tuple(f"{name}." for name in module.trainable)  # buffers of what trains belong to it
    return [name for name in module.clip.state_dict() if name not in live and not name.startswith(trained)]
