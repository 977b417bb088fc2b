"""Features of several layers together with the targets that belong to them, and the logits of the classifier."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_feat.joints.features.at_once import try_all
from lightning_feat.joints.features.batches import TargetKey, class_indices, mask_of, targets_of
from lightning_feat.joints.features.candidates import head_sizes
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read, TapError, find_layer


class Labelled(NamedTuple):
    """Features of a layer with their targets. No sample is cut out: how many are left would be a look at the device."""

    features: Tensor  # (N, D)
    targets: Tensor  # (N,) class indices, zero where a sample is left out, or (N, C)
    left_out: Tensor | None  # (N,) bool, samples that are to be ignored; None where targets are soft

    def kept(self, logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, targets and logits of the samples that count; looks at the device where some are left out."""
        if self.left_out is None or not bool(self.left_out.any()):
            return self.features, self.targets, logits
        keep = ~self.left_out
        return self.features[keep], self.targets[keep], None if logits is None else logits[keep]


class Heard(NamedTuple):
    """What one batch gave."""

    labelled: dict[str, Labelled]  # by label of the layer
    logits: Tensor | None  # (N, C) what the classifier put out, for layers that feed it


class LabelledTaps:
    """Taps on some layers and on the classifier, and the targets of the batch.

    Args:
        layers: dotted names; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of the layers.
        pooling: see ``joints.features.pooling.pool``.
        classifier: dotted name of the classifier where it cannot be found.
        target_key: where a batch keeps its targets, see ``joints.features.batches``.
        ignore_index: samples with this target are left out.
        mask_key: where a batch keeps which tokens count ``(N, T)``, see ``joints.features.pooling.pool``.

    Attributes:
        head: name and layer of the classifier, once attached; None where there is none to be found.
        feeds: for each layer, whether its features are what the classifier gets; known after the first batch.
    """

    def __init__(
        self,
        layers: list[str | None],
        read: Read | None,
        pooling: Pooling | None,
        classifier: str | None,
        target_key: TargetKey,
        ignore_index: int,
        mask_key: TargetKey = None,
    ) -> None:
        self.taps = [FeatureTap(name, read, pooling, classifier=classifier) for name in layers]
        self.labels = [tap.label for tap in self.taps]
        self.classifier = classifier
        self.target_key, self.ignore_index, self.mask_key = target_key, ignore_index, mask_key
        self.head: tuple[str, nn.Module] | None = None
        self.feeds: dict[str, bool] = {}
        self._head_taps: list[FeatureTap] = []  # its input and its output

    def attach(self, module: nn.Module) -> None:
        """Hook the layers of ``module``. Raises ``ValueError`` where one cannot be found."""
        self.remove()
        self.head = head_beside(module, self.classifier, self.taps)
        if self.head is not None:
            each = self.taps[0].pooling in ("tokens", "first", "last")  # it classifies each token, or one that is taken
            pooling = self.taps[0].pooling if each else None
            self._head_taps = [FeatureTap(self.head[0], read, pooling) for read in ("input", "output")]
        for tap in self.all_taps:
            tap.attach(module)

    @property
    def all_taps(self) -> list[FeatureTap]:
        """Those on the layers, and those on the classifier."""
        return [*self.taps, *self._head_taps]

    def listen(self) -> None:
        """Begin to hear."""
        for tap in self.all_taps:
            tap.listen()

    def hold(self) -> None:
        """Stop hearing, keep what was heard."""
        for tap in self.all_taps:
            tap.hold()

    def take(self, batch: Any) -> Heard:
        """What was heard, with the targets of ``batch``.

        Raises:
            TapError: if a layer did not run.
            ValueError: if there are no targets, or they or the mask do not fit the features.
        """
        mask, targets = try_all(
            lambda: mask_of(batch, self.mask_key),
            lambda: targets_of(batch, self.target_key),
            *(tap.check for tap in self.taps),
        )[:2]
        features = [tap.take(mask) for tap in self.taps]
        inputs, logits = self._take_head(mask)
        soft = targets.ndim == 2 and targets.is_floating_point()
        labelled, kept_logits = {}, None
        for label, tap, h in zip(self.labels, self.taps, features, strict=True):
            if label not in self.feeds:
                self.feeds[label] = inputs is not None and _alike(inputs, h)
            where = f"the targets for layer {label}"
            left_out = None
            if soft:
                t = targets
            else:
                t = class_indices(targets, len(h), where, views=tap.pooling != "tokens").to(h.device)
                left_out = t == self.ignore_index
                if tap.pooling == "tokens" and mask is not None:
                    left_out |= ~mask.to(h.device).flatten()
                t = t.masked_fill(left_out, 0)
            labelled[label] = Labelled(h, t, left_out)
            if self.feeds[label]:
                kept_logits = logits
        return Heard(labelled, kept_logits)

    def remove(self) -> None:
        """Take the hooks away. What is known of the classifier is forgotten."""
        for tap in self.all_taps:
            tap.remove()
        self.head, self._head_taps, self.feeds = None, [], {}

    def count_classes(self, module: nn.Module) -> int:
        """The number of classes that the classifier tells apart. Raises ``ValueError`` where it cannot be seen."""
        num_classes = None if self.head is None else head_sizes(self.head[1])[1]
        if num_classes is not None:
            return num_classes
        raise ValueError(
            f"{type(module).__name__} has no classifier that shows the number of classes: set num_classes."
        )

    def _take_head(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        try:
            inputs, logits = (tap.take(mask) for tap in self._head_taps)
        except (TapError, ValueError):  # it has none, it did not run, or it works on maps
            return None, None
        return inputs, logits


def head_beside(module: nn.Module, classifier: str | None, taps: Sequence[FeatureTap]) -> tuple[str, nn.Module] | None:
    """The classifier that stands beside tapped layers: the one that is named, or the one that is found.

    None where none is found and all layers are named, so that none is needed.
    """
    if classifier is not None:
        return classifier, find_layer(module, classifier)
    try:
        return find_classifier(module, "classifier")
    except ValueError:
        if any(tap.layer is None for tap in taps):
            raise
        return None


def _alike(inputs: Tensor, features: Tensor) -> bool:
    """Whether the classifier gets these features; looks at values where they do not lie in the same memory."""
    if inputs.shape != features.shape:
        return False
    if inputs.data_ptr() == features.data_ptr() and inputs.stride() == features.stride():
        return True
    # A mean that we take of half-precision features is finer than that of the network. NaN included: else one bad
    # sample decides, and on one process otherwise than on another.
    return torch.equal(inputs.nan_to_num(), features.to(inputs.dtype).nan_to_num())
