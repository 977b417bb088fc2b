from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.functional.common.class_sums import class_sums
from lightning_feat.functional.neural_collapse import class_distance_normalized_variance
from lightning_feat.functional.transfer.few_shot import FewShotError, few_shot_error, few_shot_error_bound
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.samples import Samples, loaders_of, try_parts
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

_RUN = "val"


class FewShotMonitor(MeasuresAtEpochEnds):
    """Log how well the features serve for classes the network was not trained on, of which there are only a few
    examples each: the error of the nearest class mean, and the spread between classes that bounds it.

    At the end of the last epoch, or of chosen ones, the network runs over the data once, in eval mode, each sample once
    over all processes, and leaves no trace in the training. Logged for each data set, for n shots and a layer:

    - ``few_shot_<data>/error_<n>_shot/<layer>``: error rate of the nearest class mean, means from n examples of each
      class, averaged over random episodes; ``half_width_<n>_shot``: half of the 95 % interval of that average over the
      episodes, which says nothing of other data;
    - ``bound_<n>_shot``: what the error cannot exceed, from means and variances of the classes alone; 1 says nothing;
    - ``cdnv``: the class-distance normalized variance, by which the bound falls.

    Without data of its own it takes the validation data of the run, whose classes are those trained on, and logs
    ``few_shot/...``. Source: Galanti, Gyorgy, Hutter, "On the role of neural collapse in transfer learning", ICLR 2022.

    Every process holds all features, ``4 N D`` bytes, and computes the same episodes.

    Args:
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        data: loaders or datamodules by the names to log them under, such as ``{"unseen": loader}``. Of a datamodule
            the test loader is taken, or where it has none the validation loader. Class indices may be any from zero.
        shots: numbers n of examples that make a class mean. Classes of no more examples are left out of episodes.
        episodes: random draws of classes and examples.
        classes_per_episode: classes drawn for an episode; None takes all.
        seed: of the draws. They are the same in every epoch, so that curves show the network.
        every_n_epochs: after every n-th epoch and the last; None for the last alone.
        target_key: where a batch keeps class indices, see ``joints.features.batches``.
        ignore_index: samples with this target are left out, and so are those with a target below zero.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for a ``pooling`` over tokens.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are ``"averaged"`` by an
            ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates and saves them.

    Attributes:
        results: of the last measurement, errors by the name of the data and the number of shots.
    """

    @checked
    def __init__(
        self,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        data: Mapping[str, DataLoader[Any] | LightningDataModule] | None = None,
        shots: Sequence[int] = (1, 5),
        episodes: int = 100,
        classes_per_episode: int | None = None,
        seed: int = 0,
        every_n_epochs: int | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        mask_key: TargetKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1, or None for the last epoch alone.")
        if not shots or min(shots) < 1 or len({*shots}) < len(shots):
            raise ValueError(f"shots={[*shots]}: give numbers of at least 1, each once.")
        if episodes < 1 or (classes_per_episode is not None and classes_per_episode < 2):
            raise ValueError(f"{episodes=} and {classes_per_episode=}: at least one episode, of at least two classes.")
        if data is not None and (not data or "" in data):
            raise ValueError(
                f"data={data!r}: name at least one data set, or give None for the validation data of the run."
            )
        self.tap = FeatureTap(layer, read, pooling)
        self.data, self.shots, self.seed = None if data is None else dict(data), tuple(shots), seed
        self.episodes, self.classes_per_episode, self.every_n_epochs = episodes, classes_per_episode, every_n_epochs
        self.target_key, self.ignore_index, self.mask_key = target_key, ignore_index, mask_key
        self.weights = weights
        self.ends, self.ways = EpochEnds(every_n_epochs, first=False), Ways(forward, self.state_key)
        self.results: dict[str, dict[int, FewShotError]] = {}
        self.nonfinite = NonfiniteWatch(self.state_key, "; the errors are nan")
        self._loaders: dict[str, Any] = {}
        self._told: set[str] = set()

    @property
    def state_key(self) -> str:
        return f"FewShotMonitor[{', '.join([*(self.data or {}), self.tap.label])}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results, self._told = {}, set()
        self.nonfinite.reset()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        self.tap.attach(pl_module)
        check_found(pl_module, self.state_key, [self.tap], only_reads=True)
        self._loaders = {name: self._loader_of(trainer, name, data) for name, data in (self.data or {}).items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data is None:
            make_val_loader(trainer)
        try_parts(trainer, pl_module, self, self._parts(trainer), self.data is not None)

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return self._parts(trainer) if self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> Samples:
        return Samples("Few shots", trainer, module, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        self.tap.remove()
        self._loaders = {}
        forget_check(pl_module, self.state_key)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, loader in self._parts(trainer).items():
            samples: Samples = read_clean(trainer, pl_module, self, name, loader)
            method = "few_shot" if self.data is None else f"few_shot_{name}"
            values = self._values(trainer, name, samples.features, samples.targets)
            # All processes hold the same features; sync_dist only spares the reader a warning from Lightning.
            logged = {f"{method}/{key}/{self.tap.label}": value.to(pl_module.device) for key, value in values.items()}
            pl_module.log_dict({key: value.float() for key, value in logged.items()}, sync_dist=True)

    def _values(self, trainer: Trainer, name: str, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        lost = int((~features.isfinite().all(1)).sum())
        self.nonfinite.check(trainer, self.tap.label, lost, len(features))
        values: dict[str, Tensor] = {}
        classes, index = targets.unique(return_inverse=True)
        totals = class_sums(features, index, max(1, len(classes)))
        values["cdnv"] = class_distance_normalized_variance(totals)
        self.results[name] = {}
        for n in self.shots:
            error = None if lost else self._error(name, features, targets, n)
            if error is not None:
                self.results[name][n] = error
            mean, half_width = (torch.tensor(torch.nan),) * 2 if error is None else (error.mean, error.half_width)
            bound = few_shot_error_bound(totals, n)
            values |= {f"error_{n}_shot": mean, f"half_width_{n}_shot": half_width, f"bound_{n}_shot": bound}
        return values

    def _error(self, name: str, features: Tensor, targets: Tensor, shots: int) -> FewShotError | None:
        """None, and a sentence, where there are too few classes or samples."""
        generator = torch.Generator().manual_seed(self.seed)
        try:
            return few_shot_error(features, targets, shots, self.episodes, self.classes_per_episode, generator)
        except ValueError as error:
            said = f"{self.state_key}: {name} data, {error}; the error for {shots} shots is nan."
            if said not in self._told:
                rank_zero_warn(said)
            self._told.add(said)
            return None

    def _loader_of(self, trainer: Trainer, name: str, data: DataLoader[Any] | LightningDataModule) -> Any:
        if isinstance(data, DataLoader):
            return data
        loaders = loaders_of(trainer, data)
        for part in ("test", "val"):
            if loaders[part] is not None:
                return loaders[part]
        raise ValueError(
            f"{self.state_key}: the datamodule {type(data).__name__} for {name!r} has neither a test nor a validation "
            "loader: give a DataLoader."
        )

    def _parts(self, trainer: Trainer) -> dict[str, Any]:
        if self.data is not None:
            return self._loaders
        return {_RUN: val_loaders(trainer, self.state_key, "give the monitor data of its own (argument `data`)")}
