"""What is heard of a network for a page: some layers, and the classifier behind them."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.features.batches import TargetKey, class_indices, inputs_of, mask_of, targets_of
from lightning_feat.joints.features.labelled_taps import head_beside
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read, TapError
from lightning_feat.joints.features.weights import read_weight
from lightning_feat.report.feature_set import Head


class Heard(NamedTuple):
    """What one batch gave: R rows of n samples."""

    features: list[Tensor]  # (R, D) by layer
    targets: Tensor | None  # (R,) class indices, or (R, ...) floats
    logits: Tensor | None  # (R, C)
    sample: Tensor  # (R,) which of the n
    token: Tensor | None  # (R,) which of the tokens of the sample
    keep: Tensor  # (R,) bool, rows that count
    size: int  # n


class Ears:
    """Taps on layers and on the classifier.

    Args:
        layers: dotted names; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of the layers.
        pooling: see ``joints.features.pooling.pool``.
        classifier: dotted name of the classifier, where it cannot be found.
        target_key: where a batch keeps its targets, see ``joints.features.batches``.
        ignore_index: rows with this target are left out, and so are those with a class index below zero.
        mask_key: where a batch keeps which tokens count ``(N, T)``.

    Attributes:
        without_targets: why no targets were found in the batches; empty where they were.
    """

    def __init__(
        self,
        layers: list[str | None],
        read: Read | None = None,
        pooling: Pooling | None = None,
        classifier: str | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        mask_key: TargetKey = None,
    ) -> None:
        self.taps = [FeatureTap(name, read, pooling, classifier=classifier) for name in layers]
        self.labels = [tap.label for tap in self.taps]
        self.classifier, self.target_key = classifier, target_key
        self.ignore_index, self.mask_key = ignore_index, mask_key
        self.without_targets = ""
        self._head: tuple[str, Any] | None = None
        self._head_taps: list[FeatureTap] = []
        self._feeds: str | None = None

    @property
    def all_taps(self) -> list[FeatureTap]:
        """Those on the layers, and those on the classifier."""
        return [*self.taps, *self._head_taps]

    def attach(self, module: LightningModule) -> None:
        """Hook the layers. Raises ``ValueError`` where one cannot be found; none of the hooks stays then."""
        self.remove()
        try:
            self._head = head_beside(module, self.classifier, self.taps)
            if self._head is not None:
                each = self.taps[0].pooling in ("tokens", "first", "last")
                pooling = self.taps[0].pooling if each else None
                self._head_taps = [FeatureTap(self._head[0], read, pooling) for read in ("input", "output")]
            for tap in self.all_taps:
                tap.attach(module)
        except ValueError:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks away."""
        for tap in self.all_taps:
            tap.remove()
        self._head, self._head_taps, self._feeds, self.without_targets = None, [], None, ""

    def take(self, batch: Any) -> Heard:
        """What was heard, with the targets of ``batch``.

        Raises:
            TapError: if a layer did not run.
            ValueError: if targets do not fit the features, or a key leads nowhere.
        """
        mask = mask_of(batch, self.mask_key)
        features = [tap.take(mask) for tap in self.taps]
        rows = len(features[0])
        for label, h in zip(self.labels, features, strict=True):
            if len(h) != rows:
                raise ValueError(
                    f"layer {label} gave {len(h)} rows of features and layer {self.labels[0]} {rows}: name layers "
                    "that see the same samples, or choose a pooling."
                )
        tokens = self.taps[0].pooling == "tokens"
        targets = self._targets(batch, rows, tokens)
        size = _samples(batch, rows)
        row = torch.arange(rows)
        per = rows // max(1, size)
        sample, token = (row // per, row % per) if tokens and per else (row % max(1, size), None)
        keep = torch.ones(rows, dtype=torch.bool)
        if targets is not None and not targets.is_floating_point():
            keep &= ((targets != self.ignore_index) & (targets >= 0)).cpu()
        if tokens and mask is not None:
            keep &= mask.flatten().cpu()
        return Heard(features, targets, self._logits(mask, features), sample, token, keep, size)

    def head(self) -> Head:
        """The classifier as it is now, in the memory of the host."""
        if self._head is None:
            return Head()
        name, layer = self._head
        weight, bias, basis = (_whole(read_weight(layer, part)) for part in ("weight", "bias", "basis"))
        if weight is not None and weight.ndim > 2:
            weight = weight.flatten(2).squeeze(2) if weight.shape[2:].numel() == 1 else None  # a 1 x 1 convolution
        return Head(name, self._feeds, weight, bias, basis if basis is not None and basis.ndim == 3 else None)

    def _targets(self, batch: Any, rows: int, tokens: bool) -> Tensor | None:
        try:
            found = targets_of(batch, self.target_key)
        except ValueError as error:
            if self.target_key is not None:
                raise
            self.without_targets = str(error)
            return None
        if found.ndim > 2 and found.is_floating_point():
            self.without_targets = f"what stands in their place is of shape {tuple(found.shape)}"
            return None
        if found.dtype == torch.bool:
            found = found.float()
        if not found.is_floating_point() and _kind(found, rows, tokens) == "indices":
            return class_indices(found, rows, f"the targets for layer {self.labels[0]}", views=not tokens)
        values = found.float()
        if tokens and found.ndim == 2 and found.numel() == rows:
            values = values.reshape(rows)
        if len(values) and rows % len(values) == 0:
            many = rows // len(values)
            each = [many, *[1] * (values.ndim - 1)]
            return values.repeat_interleave(many, 0) if tokens else values.repeat(each)
        raise ValueError(
            f"the targets have shape {tuple(found.shape)}, which does not fit {rows} rows of features: choose a "
            "pooling ('tokens' where each token has a target), or a target_key that leads to one target per sample."
        )

    def _logits(self, mask: Tensor | None, features: list[Tensor]) -> Tensor | None:
        try:
            inputs, logits = (tap.take(mask) for tap in self._head_taps)
        except (TapError, ValueError):  # there is no classifier, it did not run, or it works on maps
            return None
        if self._feeds is None:
            for label, h in zip(self.labels, features, strict=True):
                same = inputs.shape == h.shape and torch.equal(inputs.nan_to_num(), h.to(inputs.dtype).nan_to_num())
                if same:
                    self._feeds = label
        return logits if len(logits) == len(features[0]) else None


def _kind(targets: Tensor, rows: int, tokens: bool) -> str:
    """Whether whole numbers are class indices, or columns of several labels."""
    if targets.ndim < 2 or tokens or targets.shape[1:].numel() == 1:
        return "indices"
    columns = len(targets) == rows and bool(((targets == 0) | (targets == 1)).all())
    return "columns" if columns else "indices"


def _samples(batch: Any, rows: int) -> int:
    """Samples in a batch: as many as its inputs, where the rows divide by them."""
    inputs = inputs_of(batch)
    if isinstance(inputs, dict) or hasattr(inputs, "keys"):
        inputs = next((value for value in inputs.values() if isinstance(value, Tensor) and value.ndim), None)
    if isinstance(inputs, (tuple, list)) and inputs and isinstance(inputs[0], Tensor):
        inputs = inputs[0]
    if inputs is batch and not isinstance(inputs, Tensor):
        fields = vars(batch).values() if hasattr(batch, "__dict__") else ()
        inputs = next((value for value in fields if isinstance(value, Tensor) and value.ndim), None)
    size = len(inputs) if isinstance(inputs, Tensor) and inputs.ndim else rows
    return size if size and rows % size == 0 else rows


def _whole(weight: Any) -> Tensor | None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    return full_tensor(weight).cpu().float()
