from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.functional.transfer.probe import (
    PENALTIES,
    LinearProbeResult,
    Scaling,
    hold_out,
    linear_probe,
)
from lightning_feat.joints.arguments import checked
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


class LinearProbe(MeasuresAtEpochEnds):
    """Log how well a linear classifier reads classes from the features of a layer, as
    ``linear_probe/accuracy/<layer>``: the network stays as it is, and the classifier is fitted beside it.

    At the end of the last epoch, or of chosen ones, the network runs over the data once, in eval mode, each sample once
    over all processes, and leaves no trace in the training. A logistic regression is fitted to the features
    (``functional.transfer``), its penalty chosen on the validation part, and tested on the test part. Data with
    other classes than those trained on measure how well the features transfer.

    Without data of its own the probe takes those of the run: fitted on four fifths of the training data, in the form
    that the training loader gives them, penalty chosen on the last fifth, tested on the validation data. A fifth of
    the training part is held out in this way wherever there is no validation part beside the test part.

    Every process holds all features, and fits: ``4 N D`` bytes, and three times as much in float64 while it fits.

    Args:
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        data: a datamodule whose training, validation and test loaders to use. Its batches are converted and moved as
            those of the run.
        train: or loaders: to fit on,
        val: to choose the penalty on,
        test: to test on. Without one of the two the other is the test part.
        name: of the data: logged as ``linear_probe_<name>/accuracy/<layer>``, so that several probes can be told apart.
        every_n_epochs: after every n-th epoch and the last; None for the last alone.
        scaling: of the features, see ``functional.transfer.linear_probe``.
        penalties: to choose from.
        target_key: where a batch keeps class indices, see ``joints.features.batches``.
        ignore_index: samples with this target are left out, and so are those with a target below zero, which say that
            there is no label.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``,
            ``"last"`` or ``"tokens"``: without it padding counts.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are
            ``"averaged"`` by an ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates
            and saves them.

    Attributes:
        result: of the last probe, with the chosen penalty and the validation curve; None before.
    """

    @checked
    def __init__(
        self,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        data: LightningDataModule | None = None,
        train: DataLoader[Any] | None = None,
        val: DataLoader[Any] | None = None,
        test: DataLoader[Any] | None = None,
        name: str = "",
        every_n_epochs: int | None = None,
        scaling: Scaling = "standardize",
        penalties: Sequence[float] = PENALTIES,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        forward: Forward | None = None,
        mask_key: TargetKey = None,
        weights: WhichWeights = "current",
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
        self.scaling: Scaling = scaling
        self.penalties, self.weights = tuple(penalties), weights
        self.target_key, self.ignore_index, self.mask_key = target_key, ignore_index, mask_key
        self.ends, self.ways = EpochEnds(every_n_epochs, first=False), Ways(forward, self.state_key)
        self.result: LinearProbeResult | None = None
        self.nonfinite = NonfiniteWatch(self.state_key, "; the accuracy is nan")

    @property
    def state_key(self) -> str:
        return f"LinearProbe[{', '.join(part for part in (self.name, self.tap.label) if part)}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result = None
        self.nonfinite.reset()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        self.tap.attach(pl_module)
        check_found(pl_module, self.state_key, [self.tap], only_reads=True)
        if self.data is not None:
            self.loaders = loaders_of(trainer, self.data)
            if self.loaders["train"] is None:
                raise ValueError(
                    f"{self.state_key}: the datamodule {type(self.data).__name__} has no training loader to fit the "
                    "probe on: give it a train_dataloader, or give the loaders themselves (arguments train and test)."
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
        return Samples("Linear probe", trainer, module, self)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        features: dict[str, tuple[Tensor, Tensor]] = {}
        for name, loader in self._parts(trainer).items():
            samples: Samples = read_clean(trainer, pl_module, self, name, loader)
            features[name] = samples.features, samples.targets
        if "val" not in features:
            held = hold_out(features["train"][1])
            (h, t) = features["train"]
            features.update(train=(h[~held], t[~held]), val=(h[held], t[held]))
        accuracy = self._probe(trainer, features)
        method = f"linear_probe_{self.name}" if self.name else "linear_probe"
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
        train, val, test = (features[name] for name in ("train", "val", "test"))
        if len(train[1].unique()) < 2 or not len(val[1]) or not len(test[1]) or not train[0].shape[1]:
            rank_zero_warn(
                f"{self.state_key}: {len(train[1].unique())} classes and {train[0].shape[1]} features to fit, "
                f"{len(val[1])} samples to choose the penalty on, {len(test[1])} to test on: too few; the accuracy is "
                "nan."
            )
            return torch.tensor(torch.nan)
        self.result = linear_probe(*train, *val, *test, scaling=self.scaling, penalties=self.penalties)
        return self.result.accuracy

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
        return {str(name): loader for name, loader in parts.items()}
