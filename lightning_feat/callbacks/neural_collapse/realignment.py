from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_feat.functional.neural_collapse import prior_shift, realigned_lengths
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.features.heads import find_classifier, forget_compiled_code, head_sizes
from lightning_feat.joints.features.taps import find_layer
from lightning_feat.joints.features.weights import read_weight
from lightning_feat.joints.run.twins import refuse_twin

_Stage = Literal["validate", "test", "predict"]
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ClassNormRealignment(Callback):
    """Test and predict as if the classes had been equally frequent in training, or as frequent as they are where the
    network is used, without training anything again.

    Trained on unequal classes, the rows of a classifier are longer for large classes. While the Trainer tests or
    predicts, the logits are those of rows of other lengths (``functional.neural_collapse.realigned_lengths``) and of
    another prior (``prior_shift``); weights and checkpoints stay as they are. ``realign_classifier`` writes the same
    into the weights.

    Several loaders, such as those of the clients of federated learning, each may have their own lengths and
    frequencies: give a list for each.

    Args:
        classifier: dotted name of a ``Linear``, or a convolution of one position; None to find it.
        power: exponent of the lengths that is taken back: 1 for rows of equal length, 0 for rows as they are. Between
            them accuracy on small classes is bought with that on large ones; choose it on validation data.
        lengths: ``(C,)`` pattern that the rows take, or one for each loader: the row lengths of a classifier that was
            trained on the classes of that loader. None for equal ones.
        frequencies: ``(C,)`` how frequent the classes are where the network is used, or one for each loader; None
            leaves the prior of training.
        train_frequencies: ``(C,)`` how frequent they were in training; needed with ``frequencies``.
        stages: in which of ``"validate"``, ``"test"`` and ``"predict"``; the first stands for ``Trainer.validate`` and
            for the validation inside a fit.

    Source: Kang et al., ICLR 2020; Menon et al., ICLR 2021; Xiao et al., "FedLoGe", ICLR 2024.
    """

    @checked
    def __init__(
        self,
        classifier: str | None = None,
        power: float = 1.0,
        lengths: Sequence[float] | Sequence[Sequence[float]] | None = None,
        frequencies: Sequence[float] | Sequence[Sequence[float]] | None = None,
        train_frequencies: Sequence[float] | None = None,
        stages: Sequence[_Stage] = ("test", "predict"),
    ) -> None:
        if (frequencies is None) != (train_frequencies is None):
            raise ValueError(f"{frequencies=} and {train_frequencies=}: give both, or neither.")
        if not stages:
            raise ValueError("stages=[]: give at least one of 'validate', 'test' and 'predict'.")
        self.classifier, self.power, self.stages = classifier, power, tuple(stages)
        self.lengths, self.frequencies, self.train_frequencies = lengths, frequencies, train_frequencies
        self._change: _Change | None = None

    @property
    def state_key(self) -> str:
        return "ClassNormRealignment"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit" or "validate" in self.stages:
            self._new_change(pl_module)  # what does not fit is said now

    def _new_change(self, module: LightningModule) -> "_Change":
        return _Change(module, self.classifier, self.power, self.lengths, self.frequencies, self.train_frequencies)

    def _begin(self, module: LightningModule, stage: _Stage) -> None:
        if stage in self.stages and self._change is None:
            self._change = self._new_change(module)
            self._change.install(module)

    def _turn(self, loader: int) -> None:
        if self._change is not None:
            self._change.choose(loader)

    def _end(self) -> None:
        if self._change is not None:
            self._change.remove()
            self._change = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "predict")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._turn(dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._turn(dataloader_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._turn(dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()  # after an exception Lightning does not call teardown


@torch.no_grad()
def realign_classifier(
    module: nn.Module,
    classifier: str | None = None,
    power: float = 1.0,
    lengths: Sequence[float] | None = None,
    frequencies: Sequence[float] | None = None,
    train_frequencies: Sequence[float] | None = None,
) -> None:
    """Write into a trained classifier what ``ClassNormRealignment`` does while the Trainer tests: rows of other
    lengths, and another prior in the bias. For good; the arguments are those of that callback, for one loader.

    Raises:
        ValueError: if the classifier is not a ``Linear`` or a convolution of one position, numbers do not fit its
            classes, or ``frequencies`` are given and it has no bias to hold the prior.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> realign_classifier(module, "2")
        >>> module[2].weight.norm(dim=1).std() < 1e-6
        tensor(True)
    """
    change = _Change(module, classifier, power, lengths, frequencies, train_frequencies)
    layer: Any = change.layer
    if frequencies is not None and layer.bias is None:
        raise ValueError(
            f"{change.name} has no bias, which is to hold the prior: build it with one, or use ClassNormRealignment."
        )
    factor_C, shift_C = change.of(0)
    layer.weight.mul_(factor_C.reshape(-1, *[1] * (layer.weight.ndim - 1)).to(layer.weight))
    if frequencies is not None:
        layer.bias.add_(shift_C.to(layer.bias))


class _Change:
    """What is done to the logits of one classifier."""

    def __init__(
        self,
        module: nn.Module,
        classifier: str | None,
        power: float,
        lengths: Any,
        frequencies: Any,
        train_frequencies: Sequence[float] | None,
    ) -> None:
        if classifier is None:
            self.name, self.layer = find_classifier(module, "classifier")
        else:
            self.name, self.layer = classifier, find_layer(module, classifier)
        if not isinstance(self.layer, _LINEAR):
            raise ValueError(
                f"{self.name} is a {type(self.layer).__name__}, whose logits are not products with rows of a length of "
                "their own: realign a Linear."
            )
        weight: Tensor = full_tensor(read_weight(self.layer)).flatten(1)
        self._power, self._weight = power, weight
        num_classes = head_sizes(self.layer)[1] or len(weight)
        self._lengths = _for_loaders("lengths", lengths, num_classes)
        self._frequencies = _for_loaders("frequencies", frequencies, num_classes)
        self._trained = None
        if train_frequencies is not None:
            (self._trained,) = _for_loaders("train_frequencies", train_frequencies, num_classes)
        self._handle: Any = None
        self._made = [self.of(loader) for loader in range(max(len(self._lengths), len(self._frequencies), 1))]
        self._loader = 0

    def of(self, loader: int) -> tuple[Tensor, Tensor]:
        """Factors and shifts ``(C,)`` for the batches of this loader."""
        lengths, frequencies = _entry(self._lengths, loader), _entry(self._frequencies, loader)
        factor_C = realigned_lengths(self._weight, self._power, lengths)
        shift_C = torch.zeros_like(factor_C)
        if frequencies is not None and self._trained is not None:
            shift_C = prior_shift(frequencies, self._trained).to(factor_C.device)
        return factor_C, shift_C

    def choose(self, loader: int) -> None:
        """The batches that follow are of this loader."""
        most = max(len(self._lengths), len(self._frequencies))
        if most > 1 and loader >= most:
            raise ValueError(
                f"ClassNormRealignment: there is a loader number {loader}, but lengths or frequencies are given for "
                f"{most}: give one list for each loader, or a single one for all."
            )
        self._loader = loader if most > 1 else 0

    def install(self, module: nn.Module) -> None:
        self._handle = self.layer.register_forward_hook(self._hook)
        forget_compiled_code(module)

    def remove(self) -> None:
        self._handle.remove()

    def _hook(self, layer: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        shape = [1] * logits.ndim
        shape[-1 if isinstance(layer, nn.Linear) else -(layer.weight.ndim - 1)] = -1  # type: ignore[operator]
        factor, shift = (of.to(logits.device, logits.dtype).reshape(shape) for of in self._made[self._loader])
        bias: Any = layer.bias
        plain = 0.0 if bias is None else bias.to(logits.dtype).reshape(shape)
        return (logits - plain) * factor + plain + shift


def _for_loaders(name: str, given: Any, num_classes: int) -> list[Tensor]:
    """One tensor ``(C,)`` for each loader, or one for all; none where nothing is given."""
    if given is None:
        return []
    given = given.tolist() if isinstance(given, Tensor) else given
    rows = given if len(given) and isinstance(given[0], Sequence) else [given]
    if any(len(row) != num_classes for row in rows):
        raise ValueError(
            f"{name}: {[len(row) for row in rows]} numbers, but the classifier has {num_classes} classes: give one for "
            "each class."
        )
    return [torch.tensor([*row], dtype=torch.float64) for row in rows]


def _entry(rows: list[Tensor], loader: int) -> Tensor | None:
    return rows[loader if len(rows) > 1 else 0] if rows else None
