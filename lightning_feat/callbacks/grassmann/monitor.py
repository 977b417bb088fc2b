import weakref
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_feat.callbacks.grassmann.exact_pass import SeparationReading
from lightning_feat.callbacks.grassmann.figures import draw_angles
from lightning_feat.callbacks.grassmann.head import GrassmannHead
from lightning_feat.callbacks.grassmann.spread import FeatureSpread
from lightning_feat.callbacks.reports.figures import folder_for_figures, publish_figure
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.processes import full_tensor, repeated_rows
from lightning_feat.joints.data.shared_pass import read_clean, try_reading
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.silence import SilenceWatch
from lightning_feat.joints.features.taps import TapError, find_layer
from lightning_feat.joints.module.head_check import Asks, check_head, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.spared import run_spared
from lightning_feat.joints.run.twins import callbacks_of, refuse_twin
from lightning_feat.layers.grassmann import LOST, GrassmannLinear, off_the_manifold
from lightning_feat.metrics.grassmann import subspace_geometry


class GrassmannMonitor(MeasuresAtEpochEnds):
    """Log how the class subspaces of a ``GrassmannLinear`` lie and move, and how its features spread, as
    ``grassmann/<measure>/<layer>``.

    Of the subspaces, at the end of chosen epochs: ``angle_mean``, the mean principal angle between two of them (all
    angles of all pairs), in degrees; ``distance_from_start_mean`` and ``distance_from_start_max``, the geodesic
    distance of a subspace from where the run began, in radians, which a resumed run remembers. ``smallest_angle``
    (degrees) and ``orthonormality_error`` come from the ``GrassmannHead`` callback where there is one, else from here.

    Of the features that the head reads: ``variability``, the mean angle between two of one class, in degrees, and
    ``r2``, the separation of the classes; ``functional.transfer`` defines them. ``mode="online"`` sums the
    training batches of a chosen epoch as they pass; the variability is then that of the pairs inside each batch, and
    the weights move meanwhile; where a run resumes in the middle of an epoch, that epoch shows the batches since then
    alone, as the sums are in no checkpoint. ``mode="exact"`` runs the network over the data at the end of the epoch, in
    eval mode, each sample once over all processes, and leaves no trace.

    Cost: between chosen epochs nothing. In one, ``max_pairs`` pairs of subspaces; online, for each batch of B samples,
    ``B^2 D`` products in float64. The start of the subspaces is part of every checkpoint: as large as the basis.

    Args:
        layer: dotted name of the head; None finds it (see ``joints.features.heads.find_classifier``).
        mode: see above.
        data: for the exact mode, the ``"train"`` data or the ``"val"`` data (logged as ``grassmann_val/...``).
        every_n_epochs: after the first epoch, every n-th and, as far as it is known in time, the last.
        max_pairs: of classes to compare; up to 141 classes are all compared by default. More are sampled by ``seed``,
            the same pairs in every epoch.
        max_samples_per_class: for the exact mode, how many to take for the variability, chosen by ``seed``; every
            process holds these of all processes for a moment. R^2 is of all samples. None takes all.
        seed: of both choices.
        figure: draw a histogram of the principal angles, as a PNG in the run's own folder
            (``joints.run.folder``) and in every logger that shows images. Needs matplotlib.
        pooling: how inputs of the head that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        target_key: where a batch keeps class indices, see ``joints.features.batches``. Online, the targets must belong
            to the features: with mixup use the exact mode, on loaders that do not mix.
        ignore_index: samples with this target are left out.
        forward: for the exact mode, ``forward(module, batch)`` that runs the network; None runs it as the module's
            own step does, see ``joints.data.ways``.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``,
            ``"last"`` or ``"tokens"``: without it padding counts.
        weights: for the exact mode, which weights to look at: the ``"current"`` ones, or those that are ``"averaged"``
            by an ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates and saves them.
    """

    @checked
    def __init__(
        self,
        layer: str | None = None,
        mode: Literal["online", "exact"] = "online",
        data: Literal["train", "val"] = "train",
        every_n_epochs: int = 1,
        max_pairs: int = 10_000,
        max_samples_per_class: int | None = 100,
        seed: int = 0,
        figure: bool = False,
        pooling: Pooling | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        forward: Forward | None = None,
        mask_key: TargetKey = None,
        weights: WhichWeights = "current",
    ) -> None:
        if mode == "online" and weights == "averaged":
            raise ValueError("the online mode sees the current weights: for weights='averaged' choose mode='exact'.")
        if mode == "online" and data == "val":
            raise ValueError("the online mode sees training batches only: for data='val' choose mode='exact'.")
        smallest = 1 if max_samples_per_class is None else max_samples_per_class - 1
        if min(every_n_epochs, max_pairs, smallest) < 1:
            raise ValueError(
                f"{every_n_epochs=} and {max_pairs=} must be at least 1, and {max_samples_per_class=} at least 2."
            )
        self.layer, self.mode, self.data, self.every_n_epochs = layer, mode, data, every_n_epochs
        self.max_pairs, self.max_samples_per_class, self.seed = max_pairs, max_samples_per_class, seed
        self.figure, self.pooling, self.weights = figure, pooling, weights
        self.target_key, self.ignore_index, self.mask_key = target_key, ignore_index, mask_key
        self.ends, self.ways = EpochEnds(every_n_epochs), Ways(forward, self.state_key)
        self.start: Tensor | None = None
        self.nonfinite = NonfiniteWatch(self.state_key, " and are left out of the measures")
        self.silence = SilenceWatch(self.state_key)
        self._of: weakref.ref[LightningModule] | None = None  # whose start it is
        self._spread: FeatureSpread | None = None  # while fitting
        self._listens, self._head_reports, self._label, self._folder = False, False, "", ""
        self._failed: set[str] = set()  # what could not be done, which is said once

    @property
    def state_key(self) -> str:
        return f"GrassmannMonitor[{self.layer or 'classifier'}]"

    # Not by state_dict: of two stateful callbacks with one key Lightning complains before refuse_twin can say why.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[self.state_key] = self.start

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.start = checkpoint.get(self.state_key)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        if trainer.global_step == 0 or self._of is None or self._of() is not pl_module:
            self.start = None  # of an earlier run; a checkpoint, if any, is loaded after this
        self._of = weakref.ref(pl_module)
        if self.figure:
            self._folder = folder_for_figures(trainer, "figure=True")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._label, head = self._find(pl_module)
        keys = self.target_key, self.ignore_index, self.mask_key
        syncs = self.mode == "online"  # the exact mode gathers samples instead
        self._spread = FeatureSpread(self._label, head, self.pooling, *keys, syncs, pl_module.device)
        self._spread.tap.attach(pl_module)
        check_head(pl_module, Asks(self.state_key, (self._label,), only_reads=True, named=self.layer is not None))
        self._listens, self._failed = False, set()
        self.nonfinite.reset()
        self.silence.begin()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        self._head_reports = any(
            isinstance(other, GrassmannHead) and any(head is one for _, one in other.heads(pl_module))
            for other in callbacks_of(trainer)
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.start is None:  # not in on_fit_start: with some strategies a checkpoint is loaded after it
            self.start = full_tensor(self._find(pl_module)[1].basis).cpu().clone()
        self._listens = self.mode == "online" and self._is_due(trainer)  # also in an epoch resumed in its middle
        if self.mode == "exact" and self._spread is not None:  # what is wrong with data or network is said now
            if self.data == "val":
                make_val_loader(trainer)
            ((name, loader),) = self._loader(trainer).items()
            try_reading(trainer, pl_module, self, name, loader)
            self._spread.begin_epoch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listens = self.mode == "online" and self._is_due(trainer)
        if self._spread is not None:
            self._spread.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._listens and self._spread is not None:
            self._spread.tap.listen()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._spread is not None:
            self._spread.tap.hold()  # SAM runs training_step twice: features at perturbed weights are not wanted

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._listens or self._spread is None:
            return
        try:
            features, targets, left_out = self._spread.take(batch)
        except TapError as error:
            self.silence.note(error, outputs)
            return
        self.silence.heard()
        repeated = repeated_rows(trainer, batch_idx, len(features), features.device)
        self._spread.update(features, targets, left_out if repeated is None else left_out | repeated)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.silence.end_epoch(trainer)

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return self._loader(trainer) if self.mode == "exact" and self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> SeparationReading:
        if self._spread is None:
            raise RuntimeError("the monitor reads only while fitting.")
        return SeparationReading(trainer, module, self._spread, self.max_samples_per_class, self.seed)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        basis = full_tensor(self._find(pl_module)[1].basis)
        angles, values = subspace_geometry(basis, self.start, self.max_pairs, self.seed, alone=not self._head_reports)
        lost = values["orthonormality_error"] > LOST
        if lost and "manifold" not in self._failed:
            self._failed.add("manifold")
            rank_zero_warn(
                f"{self._label}: {off_the_manifold(float(values['orthonormality_error']))} Their angles are nan."
            )
        for measure, value in values.items():
            if measure != "orthonormality_error":
                self._log(pl_module, measure, torch.full_like(value, torch.nan) if lost else value)
            elif not self._head_reports:
                self._log(pl_module, measure, value)
        if self.figure and len(angles) and not lost and not getattr(trainer, "fast_dev_run", False):
            self._show(trainer, angles.cpu())
        if self.mode == "exact":
            ((name, loader),) = self._loader(trainer).items()
            read_clean(trainer, pl_module, self, name, loader)
        if self._spread is not None and (self.mode == "exact" or self._listens):
            suffix = "_val" if self.data == "val" else ""
            self._log(pl_module, "r2", self._spread.r2.compute(), suffix)
            self.nonfinite.check(trainer, self._label, *self._spread.lost(trainer))
            self._log(pl_module, "variability", self._spread.variability.compute(), suffix)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _find(self, module: LightningModule) -> tuple[str, GrassmannLinear]:
        if self.layer is None:
            label, head = find_classifier(module)
        else:
            label, head = self.layer, find_layer(module, self.layer)
        if not isinstance(head, GrassmannLinear):
            raise ValueError(
                f"the classifier {label} is a {type(head).__name__}, not a GrassmannLinear: add the GrassmannHead "
                "callback, or name the head (argument `layer`)."
            )
        return label, head

    def _loader(self, trainer: Trainer) -> dict[str, Any]:
        if self.data == "val":
            return {"validation": val_loaders(trainer, self.state_key, "set data='train'")}
        return {"training": trainer.train_dataloader}

    def _is_due(self, trainer: Trainer) -> bool:
        """Of an epoch that begins: as far as it is known in time."""
        epoch = trainer.current_epoch + 1
        return epoch == 1 or epoch == trainer.max_epochs or epoch % self.every_n_epochs == 0

    def _log(self, module: LightningModule, measure: str, value: Tensor, suffix: str = "") -> None:
        # Equal on all processes already; sync_dist only spares the reader a warning from Lightning.
        name = f"grassmann{suffix}/{measure}/{self._label}"
        module.log(name, value.to(module.device, torch.float32), sync_dist=True)

    @rank_zero_only
    def _show(self, trainer: Trainer, angles: Tensor) -> None:
        with run_spared("GrassmannMonitor", "draw the angles", self._failed):
            figure = draw_angles(angles)
            name = f"grassmann_angles-{self._label}-epoch={trainer.current_epoch}.png"
            publish_figure(trainer, figure, self._folder, name, f"grassmann/angles/{self._label}")

    def _let_go(self, pl_module: LightningModule) -> None:
        forget_check(pl_module, self.state_key)
        if self._spread is not None:
            self._spread.tap.remove()
        self._spread, self._listens = None, False
