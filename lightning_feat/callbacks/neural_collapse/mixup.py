import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassCalibrationError

from lightning_feat.functional.common.class_sums import ClassSums, class_sums, empty_class_sums, present_class_means
from lightning_feat.functional.neural_collapse.mixup import MixSums, draw_pairs, mix_measures, mix_sums
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward, forward_inputs
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.passes import clean_batches, clean_loader, hear, loader_like
from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.data.shared_pass import Again, read_clean, try_reading
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, class_indices, inputs_of, targets_of
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.features.weights import read_weight
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.module.head_swap import named_or_found
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.twins import refuse_twin
from lightning_feat.layers.neural_collapse import SimplexETF


class MixupGeometryMonitor(MeasuresAtEpochEnds):
    """Log where blends of two samples come to lie, as ``mixup_geometry/<measure>/<layer>``, in a training with mixup or
    without.

    After the first epoch, every n-th and the last, the network runs in eval mode over the data, for the centre of the
    features (the mean of the class means) and the calibration, and then over pairs of samples, mixed at fixed shares:
    as many pairs of one class as of two. Each time the same pairs; it leaves no trace in the training. The measures:

    - ``same_class_cosine``: of mixes of one class with the row of that class; towards 1 under mixup;
    - ``plane_residual``: share of the squared length of mixes of two classes outside the plane of their rows; to 0;
    - ``slope``: of the difference of their two logits against ``log(share / (1 - share))``: 1 where the network is as
      sure of the classes as they were mixed, above 1 where it jumps from one to the other;
    - ``slope_free``: what it would be for free features of the same margin (``free_logits``);
    - ``calibration_error``: expected error of the confidence in clean samples, over bins of equal width.

    Cost: a pass over the data, and ``2 * num_pairs * len(shares)`` more samples. Each process of several draws its
    pairs from its own share of the samples, which must hold some of two classes.

    Args:
        layer: dotted name of the classifier; None finds it. Its input is measured; it has a ``weight`` ``(C, D)``, or
            ``prototypes``.
        data: the ``"val"`` or the ``"train"`` data; the latter in the form in which the training loader gives them.
        shares: of the first sample, each strictly between 0 and 1.
        num_pairs: of each kind, over all processes; pairs repeat where the data have fewer.
        every_n_epochs: after the first epoch, every n-th and the last.
        seed: draws the pairs, by a generator of its own.
        num_bins: of the confidence, for the calibration error.
        target_key: where a batch keeps class indices, see ``joints.features.batches``. Its inputs, one floating tensor,
            come first, or are the batch.
        forward: ``forward(module, inputs)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are
            ``"averaged"`` by an ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates
            and saves them.
    """

    @checked
    def __init__(
        self,
        layer: str | None = None,
        data: Literal["train", "val"] = "val",
        shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        num_pairs: int = 256,
        every_n_epochs: int = 1,
        seed: int = 0,
        num_bins: int = 15,
        target_key: TargetKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        if not shares or not all(0 < share < 1 for share in shares):
            raise ValueError(f"shares={list(shares)}: give at least one, each strictly between 0 and 1.")
        if num_pairs < 1 or every_n_epochs < 1 or num_bins < 1:
            raise ValueError(f"{num_pairs=}, {every_n_epochs=} and {num_bins=}: each must be at least 1.")
        self.layer, self.data, self.shares = layer, data, tuple(shares)
        self.num_pairs, self.every_n_epochs, self.seed, self.num_bins = num_pairs, every_n_epochs, seed, num_bins
        self.target_key, self.weights = target_key, weights
        self.inputs = FeatureTap(layer, "input", pools=False)  # of the classifier
        self.outputs = FeatureTap(layer, pools=False)
        self.ends = EpochEnds(every_n_epochs)
        self.ways = Ways(None if forward is None else _OnInputs(forward), self.state_key)
        self.nonfinite = NonfiniteWatch(self.state_key, "; what is made of them is nan")

    @property
    def state_key(self) -> str:
        return f"MixupGeometryMonitor[{self.data}, {self.inputs.label}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, head = named_or_found(pl_module, self.layer)
        _rows(name, head)
        self.nonfinite.reset()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        self.inputs.attach(pl_module)
        check_found(pl_module, self.state_key, [self.inputs], only_reads=True)
        self.outputs = FeatureTap(name, "output", pools=False)
        self.outputs.attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is wrong with data or network is said now.
        if self.data == "val":
            make_val_loader(trainer)
        clean = clean_loader(trainer, self._loader(trainer), self.data)
        with without_trace(trainer, pl_module):
            for batch in itertools.islice(clean_batches(trainer, pl_module, clean), 1):
                _mixable(batch)
                self._classes(batch, targets_of(batch, self.target_key).numel())
        try_reading(trainer, pl_module, self, self.data, self._loader(trainer))

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return {self.data: self._loader(trainer)} if self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> "_MixReading":
        return _MixReading(trainer, module, self)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reading: _MixReading = read_clean(trainer, pl_module, self, self.data, self._loader(trainer))
        self.nonfinite.check(trainer, self.inputs.label, *reading.lost)
        for name, value in reading.values.items():
            # All processes have the same value; sync_dist only spares the reader a warning from Lightning.
            logged = value.float().to(pl_module.device)
            pl_module.log(f"mixup_geometry/{name}/{self.inputs.label}", logged, sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _loader(self, trainer: Trainer) -> Any:
        if self.data == "train":
            return trainer.train_dataloader
        return val_loaders(trainer, self.state_key, "set data='train'")

    def _classes(self, batch: Any, num_samples: int) -> Tensor:
        return class_indices(targets_of(batch, self.target_key), num_samples, f"the targets of {self.state_key}")

    def _let_go(self, pl_module: LightningModule) -> None:
        forget_check(pl_module, self.state_key)
        self.inputs.remove()
        self.outputs.remove()


class _MixReading:
    """The clean samples, for the centre and the calibration, and then the pairs.

    Attributes:
        values: the measures, the same on all processes.
        lost: samples that were not finite, and all.
    """

    title = "Mixup geometry"

    def __init__(self, trainer: Trainer, module: LightningModule, monitor: MixupGeometryMonitor) -> None:
        self._trainer, self._module, self._monitor = trainer, module, monitor
        self.taps = [monitor.inputs, monitor.outputs]
        self._rows_CD = full_tensor(_rows(*named_or_found(module, monitor.layer)))
        num_classes = len(self._rows_CD)
        self._error = MulticlassCalibrationError(num_classes, monitor.num_bins, "l1", validate_args=False)
        self._error.to(module.device)
        # Of a process without samples there are sums, too: those of none.
        self._sums = [empty_class_sums(len(self._rows_CD), self._rows_CD.shape[1], module.device)]
        self._targets = [torch.zeros(0, dtype=torch.long)]
        self._lost = torch.zeros((), device=module.device)
        self.values: dict[str, Tensor] = {}
        self.lost = 0.0, 0.0

    def take(self, batch: Any) -> None:
        _mixable(batch)
        features, logits = (tap.take() for tap in self.taps)
        classes = self._monitor._classes(batch, len(features)).to(features.device)
        self._error.update(logits.float().softmax(1), classes)
        self._sums.append(class_sums(features, classes, len(self._rows_CD)))
        self._targets.append(classes.cpu())
        self._lost += (~features.isfinite().all(1)).sum()

    def finish(self, again: Again) -> None:
        added = ClassSums(*(self._of_all(torch.stack(e).sum(0)) for e in zip(*self._sums, strict=True)))
        self.lost = float(self._of_all(self._lost)), float(added.counts.sum())
        mean_CD = present_class_means(added)
        calibration, totals = self._error.compute(), self._mixed(mean_CD.mean(0))
        measures = mix_measures(totals, torch.tensor(self._monitor.shares), len(self._rows_CD))
        self.values = {**measures, "calibration_error": calibration}

    def _mixed(self, centre_D: Tensor) -> MixSums:
        """Each process draws its pairs from its own share of the samples."""
        trainer, module, monitor = self._trainer, self._module, self._monitor
        num_classes, num_features = self._rows_CD.shape
        none = torch.zeros(0, device=module.device)
        h_ND, z_NC = none.new_zeros(0, num_features), none.new_zeros(0, num_classes)
        parts = [mix_sums(h_ND, z_NC, self._rows_CD, none.long(), none.long(), none)]
        generator = torch.Generator().manual_seed(monitor.seed)
        num_pairs = math.ceil(monitor.num_pairs / trainer.world_size)
        pairs_P2 = draw_pairs(torch.cat(self._targets), num_pairs, generator)
        clean = clean_loader(trainer, monitor._loader(trainer), monitor.data)
        for batch in clean_batches(trainer, module, _pair_loader(clean, pairs_P2)):
            inputs = _mixable(batch)
            way = monitor.ways.of(monitor.data) or forward_inputs
            classes = monitor._classes(batch, len(inputs))
            for share in monitor.shares:
                mixed = share * inputs[::2] + (1 - share) * inputs[1::2]
                features, logits = hear(trainer, module, _mixed_batch(batch, mixed), self.taps, way)
                first, second = (classes[start::2].to(features.device) for start in (0, 1))
                shares_N = torch.full((len(mixed),), share, device=features.device)
                centred_ND = features.to(centre_D) - centre_D
                parts.append(mix_sums(centred_ND, logits, self._rows_CD, first, second, shares_N))
        return MixSums(*(self._of_all(torch.stack(e).sum(0)) for e in zip(*parts, strict=True)))

    def _of_all(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if self._trainer.world_size == 1:
            return value
        total: Any = self._trainer.strategy.reduce(value.to(self._module.device), reduce_op="sum")
        return total.to(value.device)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _OnInputs:
    """A function of the inputs, as one of the batch."""

    forward: Forward

    def __call__(self, module: LightningModule, batch: Any) -> Any:
        return self.forward(module, inputs_of(batch))


def _rows(name: str, head: torch.nn.Module) -> Tensor:
    rows = head.prototypes if isinstance(head, SimplexETF) else read_weight(head)
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        raise ValueError(
            f"the classifier {name} is a {type(head).__name__}, without one vector for each class: mixed features have "
            "no row to point along. Name a Linear or a SimplexETF (argument `layer`)."
        )
    return rows


def _mixable(batch: Any) -> Tensor:
    inputs = inputs_of(batch)
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise ValueError(
            f"inputs of type {inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__} cannot be mixed: "
            "a batch must begin with a floating tensor."
        )
    return inputs


def _mixed_batch(batch: Any, mixed: Tensor) -> Any:
    """A batch like that of the pairs, with their mixes as inputs and the rest of the first sample of each."""
    if isinstance(batch, Tensor):
        return mixed
    size = 2 * len(mixed)
    rest = [tree_map(lambda leaf: _first_of_pairs(leaf, size), entry) for entry in batch[1:]]
    if hasattr(batch, "_fields"):
        return type(batch)(mixed, *rest)
    return type(batch)([mixed, *rest])


def _first_of_pairs(leaf: Any, size: int) -> Any:
    return leaf[::2] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf


def _pair_loader(clean: DataLoader[Any], pairs_P2: Tensor) -> DataLoader[Any]:
    """The pairs, one sample after the other, so that batches hold both of each."""
    size = clean.batch_size or 2
    return loader_like(clean, Subset(clean.dataset, pairs_P2.flatten().tolist()), size + size % 2)
