"""What the probes of a layer share: which data, when, and what is done with the answer."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.functional.transfer.probe import hold_out
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.samples import Loaders, Samples, loaders_of, try_parts
from lightning_feat.joints.data.shared_pass import read_clean
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.twins import refuse_twin

Part: TypeAlias = tuple[Tensor, Tensor]  # features (N, D) and class indices (N,)


class Probe(MeasuresAtEpochEnds):
    """Log how well classes can be read from the features of a layer, as ``<method>/accuracy/<layer>``.

    At the end of the last epoch, or of chosen ones, the network runs over the data once, in eval mode, each sample once
    over all processes, and leaves no trace in the training; several probes of one layer and the same data share the
    run. Data with other classes than those trained on measure how well the features transfer.

    Attributes:
        method: first part of the logged name.
        title: of the pass, for the progress bar.
        chooses: whether a part of the data is needed to choose something on.
    """

    method: str
    title: str
    chooses: bool

    def __init__(
        self,
        layer: str | None,
        read: Read | None,
        pooling: Pooling | None,
        data: LightningDataModule | None,
        train: DataLoader[Any] | None,
        val: DataLoader[Any] | None,
        test: DataLoader[Any] | None,
        name: str,
        every_n_epochs: int | None,
        target_key: TargetKey,
        ignore_index: int,
        forward: Forward | None,
        mask_key: TargetKey,
        weights: WhichWeights,
    ) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1, or None for the last epoch alone.")
        given = [part for part in (train, val, test) if part is not None]
        if given and data is not None:
            raise ValueError("data and loaders are given: give a datamodule, or train and val or test loaders.")
        if given and (train is None or len(given) < 2):
            raise ValueError("a probe with its own loaders needs train, and val or test: give both, or none at all.")
        self.tap = FeatureTap(layer, read, pooling)
        self.data, self.name, self.every_n_epochs = data, name, every_n_epochs
        self.loaders: Loaders = {"train": train, "val": val, "test": test}
        self.weights: WhichWeights = weights
        self.target_key, self.ignore_index, self.mask_key = target_key, ignore_index, mask_key
        self.ends, self.ways = EpochEnds(every_n_epochs, first=False), Ways(forward, self.state_key)
        self.nonfinite = NonfiniteWatch(self.state_key, "; the accuracy is nan")

    @abstractmethod
    def accuracy(self, parts: Mapping[str, Part]) -> Tensor:
        """Share of the ``"test"`` part that is read right by what is learned from ``"train"``, the same on all
        processes. ``"val"`` is there where the probe chooses.
        """

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{', '.join(part for part in (self.name, self.tap.label) if part)}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.nonfinite.reset()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        self.tap.attach(pl_module)
        check_found(pl_module, self.state_key, [self.tap], only_reads=True)
        if self.data is not None:
            self.loaders = loaders_of(trainer, self.data)
            if self.loaders["train"] is None:
                raise ValueError(
                    f"{self.state_key}: the datamodule {type(self.data).__name__} has no training loader for "
                    "the probe: give it a train_dataloader, or give the loaders themselves (arguments train and test)."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is wrong with the data is said now, not after the last epoch.
        foreign = any(loader is not None for loader in self.loaders.values())
        if not foreign:
            make_val_loader(trainer)
        try_parts(trainer, pl_module, self, self._parts(trainer), foreign)

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return self._parts(trainer) if self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> Samples:
        return Samples(self.title, trainer, module, self)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        features: dict[str, tuple[Tensor, Tensor]] = {}
        for name, loader in self._parts(trainer).items():
            samples: Samples = read_clean(trainer, pl_module, self, name, loader)
            features[name] = samples.features, samples.targets
        if self.chooses and "val" not in features:
            held = hold_out(features["train"][1])
            (h, t) = features["train"]
            features.update(train=(h[~held], t[~held]), val=(h[held], t[held]))
        accuracy = self._probe(trainer, features)
        method = f"{self.method}_{self.name}" if self.name else self.method
        # All processes fitted the same features; sync_dist only spares the reader a warning from Lightning.
        pl_module.log(f"{method}/accuracy/{self.tap.label}", accuracy.to(pl_module.device).float(), sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        self.tap.remove()
        forget_check(pl_module, self.state_key)

    def _probe(self, trainer: Trainer, features: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        lost = sum(int((~h.isfinite().all(1)).sum()) for h, _ in features.values())
        self.nonfinite.check(trainer, self.tap.label, lost, sum(len(h) for h, _ in features.values()))
        if lost:
            return torch.tensor(torch.nan)
        num_classes, width = len(features["train"][1].unique()), features["train"][0].shape[1]
        if num_classes < 2 or not width or not all(len(t) for _, t in features.values()):
            sizes = ", ".join(f"{len(t)} {name} samples" for name, (_, t) in features.items())
            rank_zero_warn(
                f"{self.state_key}: {num_classes} classes and {width} features to learn from, {sizes}: too few; the "
                "accuracy is nan."
            )
            return torch.tensor(torch.nan)
        return self.accuracy(features)

    def _parts(self, trainer: Trainer) -> dict[str, Any]:
        """Loaders by the name of their part: train and test, and val where the penalty has data of its own."""
        parts = {name: loader for name, loader in self.loaders.items() if loader is not None}
        if not parts:
            parts = {"train": trainer.train_dataloader}
            parts["val"] = val_loaders(
                trainer, self.state_key, "give the probe loaders of its own (arguments `data`, or `train` and `test`)"
            )
        if "test" not in parts and "val" in parts:
            parts["test"] = parts.pop("val")
        if "test" not in parts:
            raise ValueError(
                f"{self.state_key} has nothing to test on: the datamodule {type(self.data).__name__} has no test or "
                "validation loader. Give it one, or give the loaders themselves (arguments train and test)."
            )
        return {str(name): loader for name, loader in parts.items() if self.chooses or name != "val"}
