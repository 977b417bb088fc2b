"""The network itself with its prompts switched off, and who can switch them off."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import inputs_of
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.reference.hearing import precision_of, silence


class BringsPrompts(Protocol):
    """What a callback, or the LightningModule itself, offers so that the network can be run without its prompts."""

    def without_prompts(self) -> AbstractContextManager[Any]:
        """Inside, the network runs as if there were no prompts."""

    def prompt_length(self, kind: Literal["text", "image"]) -> int:
        """Tokens that the prompts of this tower take up, zero if it has none."""


def find_brings(trainer: Trainer, module: LightningModule) -> BringsPrompts:
    """Who can switch the prompts off: the module, or a callback.

    Raises:
        ValueError: if nobody can.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for candidate in [module, *callbacks]:
        if all(callable(getattr(candidate, name, None)) for name in ("without_prompts", "prompt_length")):
            brings: BringsPrompts = candidate
            return brings
    raise ValueError(
        "reference='without_prompts', but neither the module nor a callback has without_prompts() and "
        "prompt_length(kind): add the callback that brings the prompts, or take the start of the run as the reference."
    )


class WithoutPrompts:
    """The same two towers with their prompts switched off, for the same images and class names.

    Costs one pass of the image tower a batch. The text tower runs again only when its token ids change; kept are the
    features of the tokens that count, of J layers, K texts with C such tokens each: ``4 J K C D`` bytes.

    Args:
        text_layers: dotted names of blocks of the text tower.
        image_layers: of the image tower.
        forward: ``forward(module, batch)`` that runs both towers; None calls ``module.encode_text(ids)`` and
            ``module.encode_image(inputs)``. With it nothing is kept, and both towers run in each batch.
    """

    def __init__(self, text_layers: Sequence[str], image_layers: Sequence[str], forward: Forward | None = None) -> None:
        self._text = [FeatureTap(layer, pooling="tokens") for layer in text_layers]
        self._image = [FeatureTap(layer, pooling="tokens") for layer in image_layers]
        self.forward = forward
        self._kept: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    def begin(self) -> None:
        """Forget an earlier run."""
        self._kept = None

    def attach(self, module: nn.Module) -> None:
        """Hook the layers; the taps hear the reference alone."""
        for tap in [*self._text, *self._image]:
            tap.attach(module)

    def remove(self) -> None:
        """Take the hooks away."""
        for tap in [*self._text, *self._image]:
            tap.remove()

    def tower_features(
        self, module: LightningModule, batch: Any, brings: BringsPrompts, text: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """Of the image layers all tokens; of the text layers, for ids ``(K, L)`` and a mask of all their tokens, those
        in the mask; ``(tokens, D)`` each. Without ids no text layers.
        """
        with silence(module), brings.without_prompts(), torch.no_grad(), precision_of(module):
            if self.forward is not None:
                run = self.forward
                heard = _run([*self._text, *self._image], lambda: run(module, batch))
                masked = {tap.label: heard.pop(tap.label)[text[1]] for tap in self._text if text is not None}
                return {**masked, **{tap.label: heard[tap.label] for tap in self._image}}
            images = _run(self._image, lambda: _method(module, "encode_image")(inputs_of(batch)))
            return images if text is None else {**self._text_features(module, *text), **images}

    def _text_features(self, module: LightningModule, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if self._kept is None or not are_equal(self._kept[0], ids) or not are_equal(self._kept[1], mask):
            heard = _run(self._text, lambda: _method(module, "encode_text")(ids))
            self._kept = ids.clone(), mask.clone(), {label: rows[mask] for label, rows in heard.items()}
        return self._kept[2]


def _run(taps: Sequence[FeatureTap], run: Callable[[], Any]) -> dict[str, Tensor]:
    try:
        for tap in taps:
            tap.listen()
        run()
        return {tap.label: tap.take() for tap in taps}
    finally:
        for tap in taps:
            tap.drop()


def _method(module: LightningModule, name: str) -> Callable[..., Any]:
    method: Any = getattr(module, name, None)
    if not callable(method):
        raise ValueError(
            f"{type(module).__name__} has no {name}, so that its towers cannot be run one by one: give a "
            "forward(module, batch) that runs both."
        )
    return method  # type: ignore[no-any-return]


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and the same values; the same tensor is not looked into."""
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
