import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_feat.callbacks.feature_shift.figures import draw_shifts
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.callbacks.feature_shift.sums import EpochShifts
from lightning_feat.callbacks.reports.curves import Points
from lightning_feat.callbacks.reports.figures import folder_for_figures, publish_figure
from lightning_feat.callbacks.reports.history import set_point
from lightning_feat.functional.feature_shift import shift_discrepancy, shift_measures
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.silence import SilenceWatch
from lightning_feat.joints.features.taps import Read, TapError
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.reference import (
    Comparison,
    FrozenStart,
    TowerComparison,
    compare_towers,
    find_brings,
    is_new_run,
    refuse_sharding,
    warn_of_missing_start,
)
from lightning_feat.joints.run.inside import InsideFit
from lightning_feat.joints.run.spared import run_spared
from lightning_feat.joints.run.twins import callbacks_of, refuse_twin

_EVERY = 10  # batches; a look costs a third of a step


class FeatureShiftMonitor(Callback):
    """Log how far the features of chosen layers have moved from those that the network had when the run began.

    Logs, over each epoch, ``feature_shift/relative/<layer>`` and ``feature_shift/cosine/<layer>``;
    ``functional.feature_shift`` defines both. ``data="train"`` takes the training batches as they pass: the network as
    it is trained, its weights moving meanwhile, its reference in eval mode. Dropout and batch statistics then count as
    a shift. Where a run resumes in the middle of an epoch, that epoch shows the batches since then alone, as the sums
    are in no checkpoint. ``data="val"`` takes the batches of each validation, in eval mode, logged as
    ``feature_shift_val/...``; a sample that a distributed sampler repeats there counts twice.

    For two towers give ``text_layers`` and ``image_layers``, block by block. Then the difference of the shifts of pair
    j, ``feature_shift/discrepancy/<j>``, and its mean, ``feature_shift/discrepancy/mean``, are logged as well. With
    ``reference="without_prompts"`` the towers are compared with themselves without their prompts.

    Cost: one forward pass of the reference in each batch that is looked at, every tenth by default, and the weights of
    its trunk once more, on the device and in every checkpoint; see ``joints.reference``. A ``FeatureShiftRegularizer``
    in the same run with a live reference of the same trunk shares copy and pass.

    Attributes:
        history: by layer, ``(epochs completed, relative shift)``; a resumed run has all of it.

    Args:
        layers: dotted name or names, from input to output; None for the input of the classifier.
        data: see above.
        reference: ``"start"``, or ``"without_prompts"``.
        text_layers: blocks of the text tower; None for all where ``image_layers`` or prompts say that there are towers.
        image_layers: blocks of the image tower, as many.
        every_n_batches: look at batches 0, n, 2 n, ... of each epoch only. None: in training at every tenth, and at the
            last batch of an epoch with fewer; in validation at each. What is logged of training then is the mean over
            a tenth of the samples, with about three times its error from sampling. The first batch of a fit is compared
            too, without counting, so that what cannot be compared is refused there.
        figure: when fitting ends, draw the shifts as ``feature_shift.png`` (``feature_shift_val.png``) in the run's
            own folder (``joints.run.folder``), and in every logger that shows images. Needs matplotlib.
        read: the ``"output"`` or the ``"input"`` of ``layers``.
        pooling: see ``joints.features.pooling.pool``; by default every token and position counts by itself.
        mask_key: where a batch keeps which tokens count ``(N, T)``; see ``joints.features.batches``.
        trunk: submodule to copy, see ``joints.reference.FrozenStart``.
        start: file with the weights of the reference; None for those that the run begins with.
        forward: ``forward(module, batch)`` that runs the network, where the reference cannot run it by itself.
    """

    @checked
    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        data: Literal["train", "val"] = "train",
        reference: Literal["start", "without_prompts"] = "start",
        text_layers: Sequence[str] | None = None,
        image_layers: Sequence[str] | None = None,
        every_n_batches: int | None = None,
        figure: bool = False,
        read: Read | None = None,
        pooling: Pooling | None = "tokens",
        mask_key: TargetKey = None,
        trunk: str | None = None,
        start: str | None = None,
        forward: Forward | None = None,
    ) -> None:
        if every_n_batches is not None and every_n_batches < 1:
            raise ValueError(f"every_n_batches={every_n_batches} must be at least 1.")
        self.without_prompts = reference == "without_prompts"
        self.towers = self.without_prompts or bool(text_layers or image_layers)
        if self.towers and layers is not None:
            raise ValueError(f"layers={layers} beside two towers: name them all in text_layers and image_layers.")
        if self.without_prompts and (start is not None or trunk is not None):
            raise ValueError(f"{start=} and {trunk=} belong to reference='start'.")
        named: list[str | None] = [layers] if layers is None or isinstance(layers, str) else list(layers)
        if len(set(named)) < len(named) or not named:
            raise ValueError(f"layers={layers}: name each layer once, and at least one.")
        self.data, self.every_n_batches, self.figure = data, every_n_batches, figure
        self.text_layers, self.image_layers = text_layers, image_layers
        self.trunk, self.start, self.forward = trunk, start, forward
        self.history: Points = {}
        self.comparison: Comparison | TowerComparison | None = None  # of two towers it is made when a fit begins
        # With a graph while training: the reference pass of another callback, without gradient, is not to be heard.
        self._keep_graph = data == "train"
        if not self.towers:
            frozen = FrozenStart(named, read, pooling, trunk, forward, start, self._keep_graph)
            self.comparison = Comparison(named, frozen, read, pooling, mask_key, self._keep_graph)
        self._of: weakref.ref[LightningModule] | None = None  # whose start it is
        self._inside = InsideFit()
        self._shifts = EpochShifts()
        self.nonfinite = NonfiniteWatch(self.state_key, " and are left out of the shift")
        self.silence = SilenceWatch(self.state_key)
        self._listens, self._counts, self._tried, self._folder = False, True, False, ""

    @property
    def state_key(self) -> str:
        return f"FeatureShiftMonitor[{self.data}]"

    # Not by state_dict: of two stateful callbacks with one key Lightning complains before refuse_twin can say why.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        history = {name: [list(point) for point in line] for name, line in self.history.items()}
        start = {} if self._frozen is None else self._frozen.state()
        checkpoint[self.state_key] = {"history": history, "start": start}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self._inside.load(trainer)
        if self._inside:
            return  # a search goes back to where it began; the start of the run is known
        stored = checkpoint.get(self.state_key, {})
        self.history = {name: [(x, y) for x, y in line] for name, line in stored.get("history", {}).items()}
        if self._frozen is not None:
            if not stored.get("start") and self.start is None:
                warn_of_missing_start(self.state_key)
            self._frozen.restore(stored.get("start", {}))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        self._inside.setup(trainer)
        if self.towers and self.comparison is None:
            self.comparison = compare_towers(
                pl_module, self.text_layers, self.image_layers, self.without_prompts, self.forward, self.trunk,
                self.start, self._keep_graph,
            )  # fmt: skip
        if isinstance(self.comparison, TowerComparison):
            self.comparison.begin(pl_module, find_brings(trainer, pl_module) if self.without_prompts else None)
        if is_new_run(trainer, pl_module, self._of):
            self.history = {}  # of an earlier run; a checkpoint, if any, is loaded after this
            if self._frozen is not None:
                self._frozen.begin()
        self._of = weakref.ref(pl_module)
        if self._frozen is not None:
            refuse_sharding(trainer, self.state_key)
        if self.figure:
            self._folder = folder_for_figures(trainer, "figure=True")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: before configure_model the layers may not be there, or be replaced later.
        if self.comparison is None:
            return
        check_found(pl_module, self.state_key, self.comparison.all_taps, only_reads=True)
        references = [other.reference for other in callbacks_of(trainer) if isinstance(other, FeatureShiftRegularizer)]
        lent = [other for other in references if isinstance(other, FrozenStart)]
        self.comparison.attach(pl_module, lent[0] if lent else None)
        self._shifts.begin()
        self._listens, self._tried = False, False
        self.nonfinite.reset()
        self.silence.begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inside.train_start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "train":
            self._shifts.begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._frozen is not None:
            self._frozen.prepare(trainer, pl_module, batch)
        if self.data == "train":
            due = self._is_due(trainer, batch_idx)
            if due or not self._tried:
                self._listen(counts=due)
            self._tried = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._hold()  # SAM runs training_step twice: the features at the perturbed weights are not wanted

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._listens:
            self._take(pl_module, batch, must_hear=bool(outputs))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "train":
            self._report(trainer, pl_module)
            self.silence.end_epoch(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "val":
            self._shifts.begin()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        fits = self.data == "val" and trainer.state.fn == "fit" and not trainer.sanity_checking
        if fits and batch_idx % (self.every_n_batches or 1) == 0:
            self._listen()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._listens:
            self._hold()
            self._take(pl_module, batch, must_hear=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "val" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._report(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figure and self.history and not getattr(trainer, "fast_dev_run", False):
            self._show(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def relative_shifts(self) -> list[float]:
        """The relative shift of each layer heard in this epoch so far, on this process."""
        return self._shifts.relative()

    @property
    def _frozen(self) -> FrozenStart | None:
        return None if self.comparison is None else self.comparison.frozen

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        if self.every_n_batches is not None:
            return batch_idx % self.every_n_batches == 0
        # Not the first: in a short epoch it would be the only one, and in the first epoch it has not moved.
        return batch_idx % _EVERY == _EVERY - 1 or (trainer.is_last_batch and batch_idx < _EVERY)

    def _listen(self, counts: bool = True) -> None:
        self._listens, self._counts = True, counts
        if self.comparison is not None:
            self.comparison.listen()

    def _hold(self) -> None:
        if self.comparison is not None:
            self.comparison.hold()

    def _take(self, pl_module: LightningModule, batch: Any, must_hear: bool) -> None:
        self._listens = False
        if self.comparison is None:
            return
        try:
            compared = self.comparison.take(pl_module, batch)
        except TapError as error:
            self.silence.note(error, must_hear)
            return
        finally:
            self.comparison.drop()
        self.silence.heard()
        if self._counts:
            for label, pair in compared.items():
                self._shifts.add(label, pair)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        comparison = self.comparison
        if comparison is None:
            return
        relative: dict[str, Tensor] = {}
        for label, sums, lost, heard in self._shifts.over_processes(trainer, comparison.labels, pl_module.device):
            self.nonfinite.check(trainer, label, lost, heard)
            for measure, value in shift_measures(sums).items():
                self._log(pl_module, f"{measure}/{label}", value)
                if measure == "relative":
                    relative[label] = value
                    self._remember(trainer, label, float(value))
        if relative and isinstance(comparison, TowerComparison):
            still = torch.zeros((), device=pl_module.device, dtype=torch.float64)  # of a tower without prompts
            text, image = ([relative.get(tap.label, still) for tap in taps] for taps in comparison.pairs)
            discrepancy_J = shift_discrepancy(torch.stack(text), torch.stack(image))
            for j, value in enumerate(discrepancy_J):
                self._log(pl_module, f"discrepancy/{j}", value)
            self._log(pl_module, "discrepancy/mean", discrepancy_J.mean())

    def _log(self, pl_module: LightningModule, name: str, value: Tensor) -> None:
        method = "feature_shift" if self.data == "train" else "feature_shift_val"
        # Equal on all processes already; sync_dist only spares the reader a warning from Lightning.
        pl_module.log(f"{method}/{name}", value.float(), sync_dist=True)

    def _remember(self, trainer: Trainer, label: str, value: float) -> None:
        batches, done = trainer.num_training_batches, trainer.fit_loop.batch_idx + 1
        epochs = trainer.current_epoch + (done / batches if done < batches < float("inf") else 1.0)
        set_point(self.history.setdefault(label, []), epochs, value)

    @rank_zero_only
    def _show(self, trainer: Trainer) -> None:
        name = "feature_shift" if self.data == "train" else "feature_shift_val"
        where = "training" if self.data == "train" else "validation"
        with run_spared("FeatureShiftMonitor", "draw its figure"):
            figure = draw_shifts(self.history, f"shift from the start, {where} batches as they passed")
            publish_figure(trainer, figure, self._folder, f"{name}.png", f"{name}/figure")

    def _let_go(self, pl_module: LightningModule) -> None:
        forget_check(pl_module, self.state_key)
        if self.comparison is not None:
            self.comparison.remove()
        self._shifts.begin()
        self._listens = False
