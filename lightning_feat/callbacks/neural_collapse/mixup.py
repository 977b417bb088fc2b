import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassCalibrationError

from lightning_feat.functional.common.class_sums import ClassSums, class_means, class_sums
from lightning_feat.functional.neural_collapse.mixup import MixSums, draw_pairs, mix_measures, mix_sums
from lightning_feat.joints.data.passes import (
    Forward,
    clean_batches,
    clean_loader,
    is_last_epoch,
    run_forward,
    without_trace,
)
from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.features.batches import TargetKey, class_indices, inputs_of, targets_of
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.features.weights import read_weight
from lightning_feat.joints.module.head_swap import named_or_found
from lightning_feat.joints.run.twins import refuse_twin
from lightning_feat.layers.neural_collapse import SimplexETF


class MixupGeometryMonitor(Callback):
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
        forward: ``forward(module, inputs)`` that runs the network; None calls ``module(inputs)``.
    """

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
    ) -> None:
        if data not in ("train", "val"):
            raise ValueError(f"data={data!r}: choose 'train' or 'val'.")
        if not shares or not all(0 < share < 1 for share in shares):
            raise ValueError(f"shares={list(shares)}: give at least one, each strictly between 0 and 1.")
        if num_pairs < 1 or every_n_epochs < 1 or num_bins < 1:
            raise ValueError(f"{num_pairs=}, {every_n_epochs=} and {num_bins=}: each must be at least 1.")
        self.layer, self.data, self.shares = layer, data, tuple(shares)
        self.num_pairs, self.every_n_epochs, self.seed, self.num_bins = num_pairs, every_n_epochs, seed, num_bins
        self.target_key, self.forward = target_key, forward
        self.inputs, self.outputs = FeatureTap(layer, read="input"), FeatureTap(layer)  # of the classifier
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
        self.inputs.attach(pl_module)
        self.outputs = FeatureTap(name, read="output")
        self.outputs.attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is wrong with the data is said now. Loaders of a validation that comes later are not there yet.
        if self.data == "train" or trainer.val_dataloaders is not None or trainer.check_val_every_n_epoch == 1:
            loader = self._loader(trainer)
            with without_trace(trainer, pl_module):
                for batch in itertools.islice(clean_batches(trainer, pl_module, loader), 1):
                    _mixable(batch)
                    self._classes(batch, targets_of(batch, self.target_key).numel())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch != 1 and epoch % self.every_n_epochs and not is_last_epoch(trainer):
            return
        rows_CD = full_tensor(_rows(*named_or_found(pl_module, self.layer)))
        loader = self._loader(trainer)
        with without_trace(trainer, pl_module):
            centre_D, targets, calibration = self._clean(trainer, pl_module, loader, len(rows_CD))
            totals = self._mixed(trainer, pl_module, loader, targets, centre_D, rows_CD)
        values = mix_measures(totals, torch.tensor(self.shares), len(rows_CD))
        for name, value in {**values, "calibration_error": calibration}.items():
            # All processes have the same value; sync_dist only spares the reader a warning from Lightning.
            logged = value.float().to(pl_module.device)
            pl_module.log(f"mixup_geometry/{name}/{self.inputs.label}", logged, sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()  # after an exception Lightning does not call teardown

    def _loader(self, trainer: Trainer) -> DataLoader[Any]:
        loader = trainer.train_dataloader if self.data == "train" else trainer.val_dataloaders
        if not loader:
            raise ValueError(f"{self.state_key} has no {self.data} data: give the Trainer some, or set data='train'.")
        return clean_loader(trainer, loader, self.data)

    def _clean(
        self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any], num_classes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of the class means over all processes, the targets of this one, and the calibration error of all."""
        error = MulticlassCalibrationError(num_classes, self.num_bins, "l1", validate_args=False).to(module.device)
        sums: list[ClassSums] = []
        targets: list[Tensor] = []
        lost = torch.zeros((), device=module.device)
        for batch in clean_batches(trainer, module, loader):
            features, logits = self._run(trainer, module, _mixable(batch))
            classes = self._classes(batch, len(features)).to(features.device)
            error.update(logits.float().softmax(1), classes)
            sums.append(class_sums(features, classes, num_classes))
            targets.append(classes.cpu())
            lost += (~features.isfinite().all(1)).sum()
        added = ClassSums(*(_over_processes(trainer, module, torch.stack(e).sum(0)) for e in zip(*sums, strict=True)))
        lost = _over_processes(trainer, module, lost)
        self.nonfinite.check(trainer, self.inputs.label, float(lost), float(added.counts.sum()))
        mean_CD = class_means(added)[added.counts > 0]
        return mean_CD.mean(0), torch.cat(targets), error.compute()

    def _mixed(
        self,
        trainer: Trainer,
        module: LightningModule,
        clean: DataLoader[Any],
        targets: Tensor,
        centre_D: Tensor,
        rows_CD: Tensor,
    ) -> MixSums:
        parts: list[MixSums] = []
        generator = torch.Generator().manual_seed(self.seed)
        pairs_P2 = draw_pairs(targets, math.ceil(self.num_pairs / trainer.world_size), generator)
        for batch in clean_batches(trainer, module, _pair_loader(clean, pairs_P2)):
            inputs = _mixable(batch)
            classes = self._classes(batch, len(inputs))
            for share in self.shares:
                mixed = share * inputs[::2] + (1 - share) * inputs[1::2]
                features, logits = self._run(trainer, module, mixed)
                first, second = (classes[start::2].to(features.device) for start in (0, 1))
                shares_N = torch.full((len(mixed),), share, device=features.device)
                centred_ND = features.to(centre_D) - centre_D
                parts.append(mix_sums(centred_ND, logits, rows_CD, first, second, shares_N))
        return MixSums(*(_over_processes(trainer, module, torch.stack(e).sum(0)) for e in zip(*parts, strict=True)))

    def _run(self, trainer: Trainer, module: LightningModule, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of the inputs."""
        with self.inputs.listening(), self.outputs.listening():
            run_forward(trainer, module, inputs, self.forward)
            return self.inputs.take(), self.outputs.take()

    def _classes(self, batch: Any, num_samples: int) -> Tensor:
        return class_indices(targets_of(batch, self.target_key), num_samples, f"the targets of {self.state_key}")

    def _let_go(self) -> None:
        self.inputs.remove()
        self.outputs.remove()


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


def _pair_loader(clean: DataLoader[Any], pairs_P2: Tensor) -> DataLoader[Any]:
    """The pairs, one sample after the other, so that batches hold both of each."""
    size = clean.batch_size or 2
    return DataLoader(
        Subset(clean.dataset, pairs_P2.flatten().tolist()),
        batch_size=size + size % 2,
        collate_fn=clean.collate_fn,
        num_workers=clean.num_workers,
        worker_init_fn=clean.worker_init_fn,
        multiprocessing_context=clean.multiprocessing_context,
    )


def _over_processes(trainer: Trainer, module: LightningModule, value: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return value
    total: Any = trainer.strategy.reduce(value.to(module.device), reduce_op="sum")
    return total.to(value.device)  # type: ignore[no-any-return]
