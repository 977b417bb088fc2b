import functools
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_feat.callbacks.neural_collapse.classifier import tell_classifier
from lightning_feat.callbacks.neural_collapse.exact_pass import CollapseReading
from lightning_feat.callbacks.neural_collapse.online import OnlineSums
from lightning_feat.callbacks.neural_collapse.patterns import LAYER_RATIO, MeasurePatterns
from lightning_feat.callbacks.neural_collapse.report import CollapseReport
from lightning_feat.callbacks.neural_collapse.thresholds import CollapseThreshold, ThresholdWatch
from lightning_feat.functional.common.class_sums import GlobalMean
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.shared_pass import read_clean, try_reading
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.labelled_taps import LabelledTaps
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.silence import SilenceWatch
from lightning_feat.joints.features.taps import Read
from lightning_feat.joints.module.head_check import Asks, check_found, check_head, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.twins import callbacks_of, refuse_twin
from lightning_feat.metrics.neural_collapse import NeuralCollapse

_WIDEST_SPECTRUM = 2048  # up to here a (D, D) matrix takes 34 MB, and its eigenvalues 0.7 s on one CPU core
_WIDEST_ONLINE_MOMENT = 512  # up to here the D x D moment costs about a millisecond for a batch of 128 on two CPU cores


class NeuralCollapseMonitor(MeasuresAtEpochEnds):
    """Log how far the features of a layer, or of several, have collapsed, as ``neural_collapse/<measure>/<layer>``.

    The names of the measures state their convention; ``functional.neural_collapse.collapse_measures`` lists and
    defines them.

    Of several layers, listed from input to output, ``nc1_layer_ratio`` is NC1 (by quotient) over that of the layer
    before: below one where a layer draws classes together (Tirer, Huang, Niles-Weed, ICML 2023).

    ``mode="online"`` sums the training batches as they pass: no extra forward, but the weights move during the epoch,
    so the values lag those at fixed weights until training settles; they are those of the network in training mode,
    on augmented data. What a ``DistributedSampler`` repeats to even out the processes counts once, also where batches
    carry indices; what a sampler of your own draws again counts again. The sums are in no checkpoint: where a run
    resumes in the middle of an epoch, that epoch shows the batches since then alone.

    ``mode="exact"`` runs the network once over the data at the end of chosen epochs, in eval mode, each sample once
    over all processes, and adds what needs the class means first (``nc4_mismatch``, ``ncc_accuracy``, NC1 by
    pseudo-inverse without a ``(D, D)`` matrix). It keeps the features for that if they fit into ``memory_budget_mb``,
    and else runs a second time. It leaves no trace in the training: weights are bit for bit what they are without it.
    The Trainer's progress bar, if any, shows how far it is.

    NC0, NC3 and the geometry of the weights are logged for the layer that feeds a classifier with a ``weight``
    ``(C, D)`` (``nn.Linear``, cosine classifiers) or a ``SimplexETF``, and their subspace versions for one that feeds
    a ``GrassmannLinear``; of another classifier a warning says that they are left out.

    Beside the loggers: a table with all measures in full precision and, on demand, figures and thresholds that warn or
    stop. What goes wrong in writing is a warning.

    Beside an online monitor of the same layer, the exact one logs the training data as ``neural_collapse_exact/...``.

    Args:
        layer: dotted name of a submodule, or several; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        num_classes: number of classes; None takes that of the classifier.
        mode: see above.
        data: for the exact mode, the ``"train"`` data, the ``"val"`` data (logged as ``neural_collapse_val/...``), or
            ``"both"``.
        every_n_epochs: for the exact mode, and for figures in both: after the first epoch, every n-th and, as far as it
            is known in time, the last; ``"log"`` for epochs 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and the last.
        measures: patterns of the names to log, ``["*"]`` for all; None for one or two of each kind.
        classifier: dotted name of the classifier where it cannot be found; its outputs are the logits of NC4.
        target_key: where a batch keeps class indices ``(N,)`` or soft labels ``(N, C)``, see
            ``joints.features.batches``. The targets must belong to the features, which nothing can check: online, where
            ``training_step`` mixes its inputs, values come out that mean nothing. Use the exact mode there, or mix in
            ``on_after_batch_transfer``, which puts the soft labels into the batch. Mixup in a collate function is also
            in what the exact mode sees of the training data.
        ignore_index: samples with this target are left out.
        global_mean: what class means are centred by: the mean of the class means, or of all samples.
        second_moment: for the online mode, keep the ``(D, D)`` moment that NC1 by pseudo-inverse needs; None: up to D
            = 512.
        forward: for the exact mode, ``forward(module, batch)`` that runs the network; None runs it as the module's
            own step does, see ``joints.data.ways``.
        memory_budget_mb: for the exact mode, what kept features may take on each process.
        figures: draw the cosines of the class means, the spectra of the scatter within and between classes, and the
            measures over the epochs, as ``neural_collapse-<layer>-epoch=<n>.png`` in the run's own folder
            (``joints.run.folder``) and into every logger that shows images. Takes 0.6 s each, and the eigenvalues of a
            ``(D, D)`` matrix: the spectrum within classes is left out, and said to be, in the exact mode above D = 2048
            and in the online mode without the second moment. Needs matplotlib.
        table: write ``neural_collapse.csv`` into the run's own folder, with every measure in full precision, see
            ``callbacks.neural_collapse.table``; W&B, MLflow and Comet get it, too, when fitting ends. None where there
            is a logger; True also without, into ``default_root_dir``.
        thresholds: see :class:`CollapseThreshold`.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``,
            ``"last"`` or ``"tokens"``: without it padding counts.
        weights: for the exact mode, which weights to look at: the ``"current"`` ones, or those that are ``"averaged"``
            by an ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates and saves them.
    """

    @checked
    def __init__(
        self,
        layer: str | list[str] | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        num_classes: int | None = None,
        mode: Literal["online", "exact"] = "online",
        data: Literal["train", "val", "both"] = "train",
        every_n_epochs: int | Literal["log"] = 1,
        measures: list[str] | None = None,
        classifier: str | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        global_mean: GlobalMean = "classes",
        second_moment: bool | None = None,
        forward: Forward | None = None,
        memory_budget_mb: float = 1024.0,
        figures: bool = False,
        table: bool | None = None,
        thresholds: list[CollapseThreshold] | None = None,
        mask_key: TargetKey = None,
        weights: WhichWeights = "current",
    ) -> None:
        if every_n_epochs != "log" and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1, or 'log'.")
        if mode == "online" and data != "train":
            raise ValueError(
                "the online mode sees training batches only: for data='val' or 'both' choose mode='exact'."
            )
        if mode == "online" and weights == "averaged":
            raise ValueError("the online mode sees the current weights: for weights='averaged' choose mode='exact'.")
        layers: list[str | None] = [*layer] if isinstance(layer, list) else [layer]
        if len(set(layers)) < len(layers) or not layers:
            raise ValueError(f"layer={layer}: name each layer once, and at least one.")
        self.taps = LabelledTaps(layers, read, pooling, classifier, target_key, ignore_index, mask_key)
        self.num_classes = num_classes
        self._beside_online = False
        self.mode, self.data, self.every_n_epochs = mode, data, every_n_epochs
        self.ends, self.weights = EpochEnds(every_n_epochs), weights
        self.measures = MeasurePatterns(measures)
        self.global_mean, self.second_moment = global_mean, second_moment
        self.ways = Ways(forward, self.state_key)
        self.memory_budget_mb = memory_budget_mb
        self.report = CollapseReport(mode, figures, table)
        self.watch = ThresholdWatch(thresholds or [])
        self.nonfinite = NonfiniteWatch("neural collapse", " and are left out of the measures")
        self.silence = SilenceWatch(self.state_key)
        self._online = OnlineSums(self.taps, self.silence)
        self._before: dict[str, Tensor] = {}  # NC1 of the layer before, by data
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        return f"NeuralCollapseMonitor[{self.mode}, {', '.join(self.taps.labels)}]"

    # Not by state_dict: of two stateful callbacks with one key Lightning complains before refuse_twin can say why.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.report.figures:
            checkpoint[self.state_key] = self.report.points

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.report.points = checkpoint.get(self.state_key, {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        others = [other for other in callbacks_of(trainer) if isinstance(other, NeuralCollapseMonitor)]
        # Lightning would take the mean of two values of one name.
        self._beside_online = self.mode == "exact" and any(
            other.mode == "online" and set(other.taps.labels) & set(self.taps.labels) for other in others
        )
        if stage == "fit":
            self.report.start(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: before configure_model the layers may not be there, or be replaced later.
        self._warned = set()
        self._online.begin()
        self.measures.begin()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        self.watch.reset()
        self.nonfinite.reset()
        self.silence.begin()
        self.taps.attach(pl_module)
        if self.num_classes is None:
            self.taps.count_classes(pl_module)  # what cannot be seen is asked for now
        if self.taps.head is not None:
            named = self.taps.classifier is not None
            asks = Asks(self.state_key, (self.taps.head[0],), "classifier", only_reads=True, named=named)
            check_head(pl_module, asks)
        if len(self.taps.taps) == 1 and self.taps.taps[0].layer is not None:
            check_found(pl_module, self.state_key, self.taps.taps, only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mode == "exact":  # what is wrong with the data, or with how the network is run, is said now
            if self.data != "train":
                make_val_loader(trainer)
            for name, loader in self._loaders(trainer).items():
                try_reading(trainer, pl_module, self, name, loader, self.taps.taps)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._online.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mode == "online":
            self.taps.listen()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.taps.hold()  # SAM runs training_step twice: the features at the perturbed weights are not wanted

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.mode == "online":
            self._online.take(trainer, functools.partial(self._metric, pl_module), outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mode == "online":
            for label, metric in self._online.by_layer():
                self._report(trainer, pl_module, metric, label, "train")
            self.silence.end_epoch(trainer)
            self._end_round()
        else:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mode == "exact":
            super().on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report.finish(trainer)  # before Lightning closes the loggers

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()
        forget_check(pl_module, self.state_key)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.report.finish(trainer)
        forget_check(pl_module, self.state_key)
        self._let_go()  # after an exception Lightning does not call teardown

    def _loaders(self, trainer: Trainer) -> dict[str, Any]:
        loaders = {"training": trainer.train_dataloader} if self.data != "val" else {}
        if self.data != "train":
            loaders["validation"] = val_loaders(trainer, self.state_key, "set data='train'")
        return loaders

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return self._loaders(trainer) if self.mode == "exact" and self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> CollapseReading:
        new_metric = functools.partial(self._metric, module)
        return CollapseReading(trainer, module, name, self.taps, new_metric, self.memory_budget_mb)

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        for name, loader in self._loaders(trainer).items():
            reading: CollapseReading = read_clean(trainer, module, self, name, loader)
            for label, metric in reading.metrics.items():
                self._report(trainer, module, metric, label, "train" if name == "training" else "val")
        self._end_round()

    def _end_round(self) -> None:
        self.watch.end_round()
        self._before = {}
        if lost := self.measures.never_given():
            self._warn_once(lost)

    def _metric(self, module: LightningModule, features: Tensor) -> NeuralCollapse:
        num_classes = self.taps.count_classes(module) if self.num_classes is None else self.num_classes
        width = features.shape[1]
        moment = width <= _WIDEST_ONLINE_MOMENT if self.second_moment is None else self.second_moment
        metric = NeuralCollapse(
            num_classes,
            width,
            second_moment=self.mode == "online" and moment,
            global_mean=self.global_mean,
            within_scatter=self.mode == "exact" and self.report.figures and width <= _WIDEST_SPECTRUM,
        )
        return metric.to(features.device)

    def _report(self, trainer: Trainer, module: LightningModule, metric: NeuralCollapse, label: str, data: str) -> None:
        head = self.taps.head if self.taps.feeds.get(label, False) else None
        if head is not None and (lacking := tell_classifier(metric, *head)):
            self._warn_once(lacking)
        values = metric.compute()
        lost = int(values.pop("nonfinite_samples"))
        if (before := self._before.get(data)) is not None:
            values[LAYER_RATIO] = values["nc1_quotient"] / before
        self._before[data] = values["nc1_quotient"]
        self.nonfinite.check(trainer, label, lost, lost + float(metric.counts.sum()) * trainer.world_size)
        train = "neural_collapse_exact" if self._beside_online else "neural_collapse"
        method = train if data == "train" else "neural_collapse_val"
        chosen = self.measures.choose(values)
        for name, value in values.items():
            if name in chosen:
                # compute() agrees on all processes already; sync_dist only spares the reader a warning from Lightning.
                module.log(f"{method}/{name}/{label}", value.float(), sync_dist=True)
        numbers = {name: float(value) for name, value in values.items()}
        self.watch.check(trainer, label, data, numbers)  # first: it may say that this epoch is the last
        picture = metric.picture() if self.report.figures and self.ends.is_due(trainer) else None
        self.report.add(trainer, label, data, numbers, picture)

    def _warn_once(self, sentence: str) -> None:
        if (subject := sentence.partition(":")[0]) not in self._warned:
            self._warned.add(subject)
            rank_zero_warn(f"neural collapse: {sentence}")

    def _let_go(self) -> None:
        self.taps.remove()
        self._online.begin()
