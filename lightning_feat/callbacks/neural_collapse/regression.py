from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_feat.functional.neural_collapse.regression import nrc1, nrc2, nrc3, nrc3_best_gamma, target_covariance
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.processes import full_tensor, gather_samples
from lightning_feat.joints.data.shared_pass import Again, read_clean, try_reading
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, targets_of
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.features.weights import read_weight
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.module.head_swap import named_or_found
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.twins import refuse_twin


class RegressionCollapseMonitor(MeasuresAtEpochEnds):
    """Log how far a network with several outputs has collapsed, as ``regression_collapse/<measure>/<layer>``.

    ``nrc1``, ``nrc2`` and ``nrc3`` are those of ``functional.neural_collapse``, of the features that the last
    layer gets. The gamma of ``nrc3`` is the best for the head as it is, logged as ``nrc3_gamma``, so that the value is
    the lower bound of any other choice; the paper takes that of the last epoch for all. A single output has no
    ``nrc3``.

    At the end of chosen epochs the network runs over the data once, in eval mode, each sample once over all processes,
    and leaves no trace in the training. Every process holds all features, ``8 N D`` bytes.

    Args:
        head: dotted name of the last layer, an ``nn.Linear``; None to find it.
        data: the ``"train"`` data, or the ``"val"`` data (logged as ``regression_collapse_val/...``).
        every_n_epochs: after the first epoch, every n-th and the last.
        centered: whether NRC1 takes the principal components of the centred features.
        target_key: where a batch keeps the targets ``(N,)`` or ``(N, n)``, see ``joints.features.batches``.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are
            ``"averaged"`` by an ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates
            and saves them.
    """

    @checked
    def __init__(
        self,
        head: str | None = None,
        data: Literal["train", "val"] = "train",
        every_n_epochs: int = 1,
        centered: bool = True,
        target_key: TargetKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1.")
        self.tap = FeatureTap(head, "input", pools=False, asks="head")
        self.data, self.every_n_epochs, self.centered = data, every_n_epochs, centered
        self.target_key, self.weights = target_key, weights
        self.ends, self.ways = EpochEnds(every_n_epochs), Ways(forward, self.state_key)
        self.nonfinite = NonfiniteWatch(self.state_key, "; what is made of them is nan")

    @property
    def state_key(self) -> str:
        return f"RegressionCollapseMonitor[{self.data}, {self.tap.label}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        head = self._head(pl_module)
        if head.in_features < head.out_features:
            raise ValueError(
                f"{self.state_key}: the last layer turns {head.in_features} features into {head.out_features} outputs, "
                "but regression collapse is defined for no more outputs than features."
            )
        self.nonfinite.reset()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        self.tap.attach(pl_module)
        check_found(pl_module, self.state_key, [self.tap], only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "val":
            make_val_loader(trainer)
        for name, loader in self._loader(trainer).items():  # what is wrong with data or network is said now
            try_reading(trainer, pl_module, self, name, loader)

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return self._loader(trainer) if self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> "_Samples":
        return _Samples(trainer, module, self.tap, self._targets)

    def _loader(self, trainer: Trainer) -> dict[str, Any]:
        if self.data == "val":
            return {"validation": val_loaders(trainer, self.state_key, "set data='train'")}
        return {"training": trainer.train_dataloader}

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ((name, loader),) = self._loader(trainer).items()
        samples: _Samples = read_clean(trainer, pl_module, self, name, loader)
        features, targets = samples.features, samples.targets
        lost = int((~features.isfinite().all(1)).sum())
        self.nonfinite.check(trainer, self.tap.label, lost, len(features))
        weight = full_tensor(read_weight(self._head(pl_module)))
        values = {"nrc1": nrc1(features, targets.shape[1], self.centered), "nrc2": nrc2(features, weight)}
        if targets.shape[1] > 1:
            covariance = target_covariance(targets)
            values["nrc3_gamma"] = nrc3_best_gamma(weight, covariance)
            values["nrc3"] = nrc3(weight, covariance, values["nrc3_gamma"])
        method = "regression_collapse_val" if self.data == "val" else "regression_collapse"
        for name, value in values.items():
            # All processes hold the same features; sync_dist only spares the reader a warning from Lightning.
            logged = value.to(pl_module.device, torch.float32)
            pl_module.log(f"{method}/{name}/{self.tap.label}", logged, sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        self.tap.remove()
        forget_check(pl_module, self.state_key)

    def _head(self, module: LightningModule) -> nn.Linear:
        name = self.tap.layer
        head = named_or_found(module, name, "head")[1]
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"{self.state_key}: the last layer is a {type(head).__name__}, but must be an nn.Linear: name it "
                "(argument `head`)."
            )
        return head

    def _targets(self, batch: Any, features: Tensor) -> Tensor:
        targets = targets_of(batch, self.target_key)
        targets = targets[:, None] if targets.ndim == 1 else targets
        if not targets.is_floating_point() or targets.ndim != 2 or len(targets) != len(features):
            raise ValueError(
                f"{self.state_key} needs floating targets (N,) or (N, n) for features {tuple(features.shape)}, got "
                f"{tuple(targets.shape)} {targets.dtype}: set target_key, or take NeuralCollapseMonitor for classes."
            )
        return targets.to(features.device)


class _Samples:
    """Features ``(N, D)`` and targets ``(N, n)`` of all processes, in the order of the data set."""

    title = "Regression collapse"

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        tap: FeatureTap,
        targets_of: Callable[[Any, Tensor], Tensor],
    ) -> None:
        self._trainer, self._targets_of, self.taps = trainer, targets_of, [tap]
        self.features = self.targets = torch.zeros(0, 1, device=module.device)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def take(self, batch: Any) -> None:
        features = self.taps[0].take()
        self._parts.append((features, self._targets_of(batch, features)))

    def finish(self, again: Again) -> None:
        if self._parts:
            self.features, self.targets = (torch.cat(column) for column in zip(*self._parts, strict=True))
        self._parts = []
        world, device = self._trainer.world_size, self.features.device
        index = self._trainer.global_rank + world * torch.arange(len(self.features), device=device)
        self.features, self.targets, _ = gather_samples(self.features, self.targets, index)
