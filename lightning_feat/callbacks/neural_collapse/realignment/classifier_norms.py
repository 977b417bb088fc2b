import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from lightning_feat.callbacks.neural_collapse.realignment.logit_change import LogitChange
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.features.heads import is_compiled
from lightning_feat.joints.run.twins import refuse_twin

_Stage = Literal["validate", "test", "predict"]


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
        classifier: dotted name of a ``Linear``, or a convolution; None to find it.
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
        self._change: LogitChange | None = None

    @property
    def state_key(self) -> str:
        return "ClassNormRealignment"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What does not fit is said now; not in setup, where a module may have no layers yet.
        if "validate" in self.stages:
            self._new_change(pl_module)

    def _new_change(self, module: LightningModule) -> LogitChange:
        return LogitChange(module, self.classifier, self.power, self.lengths, self.frequencies, self.train_frequencies)

    def _begin(self, module: LightningModule, stage: _Stage, loaders: CombinedLoader | None) -> None:
        if stage in self.stages and self._change is None:
            change = self._new_change(module)
            change.check_loaders(loaders)
            change.install(module)
            self._change = change

    def _turn(self, loader: int) -> None:
        if self._change is not None:
            self._change.choose(loader)

    def _look(self, module: LightningModule) -> None:
        """After a batch: whether anything came of it."""
        change = self._change
        if change is None or change.told:
            return
        change.told = True
        if not change.ran and not any(is_compiled(part) for part in module.modules()):
            warnings.warn(
                f"ClassNormRealignment: {change.name} did not run in the first batch, whose logits stay as they were. "
                "Is its weight used functionally (F.linear(x, layer.weight))? Call the layer, or name another "
                "(argument `classifier`).",
                stacklevel=2,
            )

    def _end(self) -> None:
        if self._change is not None:
            self._change.remove()
            self._change = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "validate", trainer._evaluation_loop._combined_loader)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "test", trainer._evaluation_loop._combined_loader)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "predict", trainer.predict_loop._combined_loader)

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

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *loader: int
    ) -> None:
        self._look(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *loader: int
    ) -> None:
        self._look(pl_module)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *loader: int
    ) -> None:
        self._look(pl_module)

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
        ValueError: if the classifier is not a ``Linear`` or a convolution, numbers do not fit its classes, its weight
            is computed of other parameters, or ``frequencies`` are given and it has no bias to hold the prior.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> realign_classifier(module, "2")
        >>> module[2].weight.norm(dim=1).std() < 1e-6
        tensor(True)
    """
    change = LogitChange(module, classifier, power, lengths, frequencies, train_frequencies)
    layer: Any = change.layer
    if frequencies is not None and layer.bias is None:
        raise ValueError(
            f"{change.name} has no bias, which is to hold the prior: build it with one, or use ClassNormRealignment."
        )
    for name in ("weight", "bias") if frequencies is not None else ("weight",):
        if name not in layer._parameters:  # computed of others, such as by weight_norm: what is written is lost
            raise ValueError(
                f"the {name} of {change.name} is computed when it is read, and cannot be written: take the "
                "parametrization away (torch.nn.utils.parametrize.remove_parametrizations), or use "
                "ClassNormRealignment."
            )
    factor_C, shift_C = change.of(0)
    layer.weight.mul_(factor_C.reshape(-1, *[1] * (layer.weight.ndim - 1)).to(layer.weight))
    if frequencies is not None:
        layer.bias.add_(shift_C.to(layer.bias))
