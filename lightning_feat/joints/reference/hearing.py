"""Taps that a reference needs, and how to run a network so that no other tap hears it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.features.taps import Ear, FeatureTap

READS_INPUT = "layers` with `read='input'"  # by which a user names the classifier


class AskedTap(FeatureTap):
    """Says whether it has heard."""

    @property
    def has_heard(self) -> bool:
        return self._ear is not None and bool(self._ear.heard)


class ComparedTap(FeatureTap):
    """Of a layer that is held beside its reference, and may be the one that makes the logits: they drift, too."""

    says_read = True

    def find(self, module: nn.Module) -> nn.Module:
        return super().find(module) if self.layer is not None else find_compared(module)[1]


def find_compared(module: nn.Module) -> tuple[str, nn.Module]:
    """The classifier, whose input is compared where no layers are named. The question, where there is none, is for the
    callbacks of feature shift.
    """
    try:
        return find_classifier(module, READS_INPUT)
    except ValueError as error:
        try:
            towers = find_clip_towers(module)
        except ValueError:
            raise error from None
        text, image = towers.text.block_names[-1], towers.image.block_names[-1]
        raise ValueError(
            f"{type(module).__name__} has two towers and no layer that is plainly a classifier: name blocks of both, "
            f"as text_layers=[{text!r}] and image_layers=[{image!r}], in place of layers."
        ) from None


class DeafTap(FeatureTap):
    """Stands among the taps of a loss term and hears nothing: by it a reference is there in time for the optimizer."""

    def __init__(self, brought: Any) -> None:
        super().__init__(layer="")
        self.brought = brought

    def attach(self, module: nn.Module) -> None:
        self.brought.attach(module)

    def listen(self) -> None:
        pass

    def remove(self) -> None:
        self.brought.remove()


@contextmanager
def silence(module: nn.Module) -> Iterator[None]:
    """Inside, no tap of anybody on ``module`` hears anything that was listening before."""
    ears = {id(ear): ear for part in module.modules() for ear in _ears_on(part) if ear.listening}
    for ear in ears.values():
        ear.listening = False
    try:
        yield
    finally:
        for ear in ears.values():
            ear.listening = True


def _ears_on(part: nn.Module) -> Iterator[Ear]:
    for hook in [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]:
        ear = getattr(hook, "__self__", None)
        if isinstance(ear, Ear):
            yield ear


def precision_of(module: LightningModule) -> AbstractContextManager[Any]:
    """The precision that the module's training step runs in."""
    trainer = module._trainer  # None where the step is called by hand
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
