from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.functional.transfer.probe import (
    PENALTIES,
    LinearProbeResult,
    Scaling,
    hold_out,
    linear_probe,
)
from lightning_feat.joints.data.passes import (
    Forward,
    clean_batches,
    clean_loader,
    is_last_epoch,
    run_forward,
    without_trace,
)
from lightning_feat.joints.data.processes import gather_samples
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.taps import FeatureTap, Pooling, Read
from lightning_feat.joints.run.twins import refuse_twin

_Loaders = dict[Literal["train", "val", "test"], Any]


class LinearProbe(Callback):
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
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.taps.pool``.
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
        ignore_index: samples with this target are left out.
        forward: ``forward(module, batch)`` that runs the network; None calls ``module(batch[0])`` for a tuple or list,
            else ``module(batch)``.

    Attributes:
        result: of the last probe, with the chosen penalty and the validation curve; None before.
    """

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
        self.loaders: _Loaders = {"train": train, "val": val, "test": test}
        self.scaling: Scaling = scaling
        self.penalties = tuple(penalties)
        self.target_key, self.ignore_index, self.forward = target_key, ignore_index, forward
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
        self.tap.attach(pl_module)
        if self.data is not None:
            self.loaders = _loaders_of(trainer, self.data)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is wrong with the data is said now, not after the last epoch. Loaders of a validation that comes later
        # are not there yet.
        late = trainer.val_dataloaders is None and trainer.check_val_every_n_epoch != 1
        for name, loader in self._parts(trainer, val_may_be_missing=late).items():
            clean_loader(trainer, loader, name)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        own = any(loader is not None for loader in self.loaders.values())
        if batch_idx == 0 and not own:  # what is wrong with the targets is said now
            targets = targets_of(batch, self.target_key)
            class_indices(targets, targets.numel(), f"the targets for layer {self.tap.label}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_due(trainer):
            return
        features = {
            name: self._read(trainer, pl_module, clean_loader(trainer, loader, name))
            for name, loader in self._parts(trainer).items()
        }
        if "val" not in features:
            held = hold_out(features["train"][1])
            (h, t) = features["train"]
            features.update(train=(h[~held], t[~held]), val=(h[held], t[held]))
        accuracy = self._probe(trainer, features)
        method = f"linear_probe_{self.name}" if self.name else "linear_probe"
        # All processes fitted the same features; sync_dist only spares the reader a warning from Lightning.
        pl_module.log(f"{method}/accuracy/{self.tap.label}", accuracy.to(pl_module.device).float(), sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.tap.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.tap.remove()  # after an exception Lightning does not call teardown

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

    def _parts(self, trainer: Trainer, val_may_be_missing: bool = False) -> dict[str, Any]:
        """Loaders by the name of their part: train and test, and val where the penalty has data of its own."""
        parts = {name: loader for name, loader in self.loaders.items() if loader is not None}
        if not parts:
            parts = {"train": trainer.train_dataloader}
            if trainer.val_dataloaders:
                parts["val"] = trainer.val_dataloaders
        if "test" not in parts and "val" in parts:
            parts["test"] = parts.pop("val")
        if "test" not in parts and not val_may_be_missing:
            raise ValueError(
                f"{self.state_key} has nothing to test on: the run has no validation data. Give the Trainer validation "
                "data, or the probe loaders of its own (arguments `data`, or `train` and `test`)."
            )
        return {str(name): loader for name, loader in parts.items()}

    def _read(self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
        """Features and targets of all processes, in the order of the data set."""
        features, targets = [], []
        with without_trace(trainer, module):
            for batch in clean_batches(trainer, module, loader):
                with self.tap.listening():
                    run_forward(trainer, module, batch, self.forward)
                    h = self.tap.take()
                features.append(h)
                where = f"the targets for layer {self.tap.label}"
                found = class_indices(targets_of(batch, self.target_key), len(h), where, self.tap.pooling != "tokens")
                targets.append(found.to(h.device))
        h = torch.cat(features) if features else torch.zeros(0, 1, device=module.device)
        t = torch.cat(targets) if targets else torch.zeros(0, dtype=torch.long, device=module.device)
        index = trainer.global_rank + trainer.world_size * torch.arange(len(t), device=t.device)
        h, t, _ = gather_samples(h, t, index)
        keep = t != self.ignore_index
        return h[keep], t[keep]

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is not None and epoch % self.every_n_epochs == 0:
            return True
        return is_last_epoch(trainer)


def _loaders_of(trainer: Trainer, data: LightningDataModule) -> _Loaders:
    with isolate_rng():
        if trainer.local_rank == 0 and (data.prepare_data_per_node or trainer.global_rank == 0):
            data.prepare_data()
        trainer.strategy.barrier("LinearProbe")
        data.setup("fit")
        loaders: _Loaders = {"train": data.train_dataloader(), "val": None, "test": None}
        if is_overridden("val_dataloader", data, LightningDataModule):
            loaders["val"] = data.val_dataloader()
        if is_overridden("test_dataloader", data, LightningDataModule):
            data.setup("test")
            loaders["test"] = data.test_dataloader()
    return loaders
