"""Features of some layers beside those of their reference."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_feat.joints.features.batches import TargetKey, targets_of
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read
from lightning_feat.joints.reference.frozen_start import FrozenStart
from lightning_feat.joints.reference.hearing import READS_INPUT, ComparedTap


class Reference(Protocol):
    """Gives features to compare those of this step with.

    Attributes:
        labels: of the layers.
        shapes: by label, what the layer gave when the features were made, call by call, without the number of samples;
            empty where that is not known.
    """

    labels: list[str]
    shapes: dict[str, list[tuple[int, ...]]]

    def features(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        """By label of the layer, what it would put out for ``batch``; without gradient."""


class Compared(NamedTuple):
    """Features of a layer and those of the reference, of the same tokens."""

    features: Tensor  # (R, D)
    reference: Tensor  # (R, D)
    mask: Tensor | None = None  # (R,) which of them count, None for all


class Listening(ABC):
    """What hears features in a step and their reference, as one: put in place and taken away together."""

    reference: Any

    @property
    @abstractmethod
    def all_taps(self) -> list[FeatureTap]:
        """What must listen in a step, and be attached before."""

    @property
    def frozen(self) -> FrozenStart | None:
        """The reference, where it is a frozen copy of the start."""
        return self.reference if isinstance(self.reference, FrozenStart) else None

    def attach(self, module: LightningModule, like: FrozenStart | None = None) -> None:
        """Put all taps in place, and the frozen copy, which may be shared with ``like``."""
        for tap in self.all_taps:
            if self.frozen is None or tap is not self.frozen.calls:
                tap.attach(module)
        if self.frozen is not None:
            self.frozen.attach(module, like)

    def listen(self) -> None:
        """From the start of a batch."""
        for part in self._parts():
            part.listen()

    def hold(self) -> None:
        """When the features of the batch are there."""
        for part in self._parts():
            part.hold()

    def drop(self) -> None:
        """Forget what the taps have heard."""
        for tap in self.all_taps:
            tap.drop()

    def remove(self) -> None:
        """Take all away again."""
        for part in self._parts():
            part.remove()

    def _parts(self) -> list[Any]:
        return [*self.all_taps, *([] if self.frozen is None else [self.frozen])]


class Comparison(Listening):
    """Taps on some layers, and a reference to compare them with.

    Args:
        layers: dotted names; None for the input of the classifier.
        reference: gives the features of the same layers.
        read: the ``"output"`` or the ``"input"`` of the layers.
        pooling: see ``joints.features.pooling.pool``; that of the reference.
        mask_key: where a batch keeps which tokens count, bool or 0 and 1, ``(N, T)``: see ``joints.features.batches``.
        keep_graph: keep the features differentiable, and hear only passes with gradient.
    """

    def __init__(
        self,
        layers: Sequence[str | None],
        reference: Reference,
        read: Read | None,
        pooling: Pooling | None,
        mask_key: TargetKey,
        keep_graph: bool,
    ) -> None:
        self.taps = [ComparedTap(layer, read, pooling, keep_graph, asks=READS_INPUT) for layer in layers]
        self.labels = [tap.label for tap in self.taps]
        self.reference, self.mask_key = reference, mask_key

    @property
    def all_taps(self) -> list[FeatureTap]:
        return [*self.taps, *([self.reference.calls] if isinstance(self.reference, FrozenStart) else [])]

    def take(self, module: LightningModule, batch: Any) -> dict[str, Compared]:
        """What the taps have heard of this batch, beside its reference."""
        shapes = {tap.label: tap.shapes for tap in self.taps}
        heard = {tap.label: tap.take() for tap in self.taps}
        reference = self.reference.features(module, batch)
        for label, calls in self.reference.shapes.items():
            self._refuse_other_path(label, [shape[1:] for shape in shapes[label]], calls)
        mask = None if self.mask_key is None else targets_of(batch, self.mask_key, "mask_key").bool().flatten()
        return {label: Compared(features, reference[label], mask) for label, features in heard.items()}

    def _refuse_other_path(self, label: str, now: list[tuple[int, ...]], then: list[tuple[int, ...]]) -> None:
        """Features are paired in the order in which they come: that of one path through the network."""
        if now != then:
            raise ValueError(
                f"layer {label} ran {len(now)} times in this step, on {_told(now)}, but {len(then)} times in its "
                f"reference, which is in eval mode, on {_told(then)}: the network takes another path there, and the "
                "features of one sample would be compared with those of another. Compare in validation (a monitor's "
                "data='val'), name a layer that both paths run alike, or give a forward(module, batch) that takes the "
                "same path."
            )


def _told(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(f"(N, {', '.join(map(str, shape))})" for shape in dict.fromkeys(shapes)) or "nothing"
