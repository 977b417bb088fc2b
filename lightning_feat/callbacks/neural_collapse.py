from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_feat.batches import TargetKey, targets_of
from lightning_feat.callbacks.twins import refuse_twin
from lightning_feat.functional.class_sums import GlobalMean
from lightning_feat.labelled_taps import Heard, LabelledTaps
from lightning_feat.layers.grassmann import GrassmannLinear
from lightning_feat.metrics.neural_collapse import NeuralCollapse
from lightning_feat.passes import Forward, clean_batches, clean_loader, run_forward, without_trace
from lightning_feat.processes import full_tensor, repeated_rows
from lightning_feat.taps import Pooling, Read, TapError

DEFAULT_MEASURES = (
    *("nc0", "nc1_pinv_over_k", "nc1_quotient", "cdnv", "vci", "nc2_equinorm", "nc2_equiangularity", "nc2_etf_error"),
    *("nc2_subspace_*", "nc3", "nc3_subspace_angle", "nc4_mismatch", "ncc_accuracy"),
)
_WIDEST_ONLINE_MOMENT = 512  # up to here the D x D moment costs about a millisecond for a batch of 128 on two CPU cores


class NeuralCollapseMonitor(Callback):
    """Log how far the features of a layer, or of several, have collapsed, as ``neural_collapse/<measure>/<layer>``.

    The names of the measures state their convention; ``functional.neural_collapse.collapse_measures`` lists and
    defines them.

    ``mode="online"`` sums the training batches as they pass: no extra forward, but the weights move during the epoch,
    so the values lag those at fixed weights until training settles; they are those of the network in training mode,
    on augmented data. ``mode="exact"`` runs the network once over the data at the end of chosen epochs, in eval mode,
    each sample once over all processes, and adds what needs the class means first (``nc4_mismatch``,
    ``ncc_accuracy``, NC1 by pseudo-inverse without a ``(D, D)`` matrix). It keeps the features for that if they fit
    into ``memory_budget_mb``, and else runs a second time. It leaves no trace in the training: weights are bit for
    bit what they are without it.

    NC0, NC3 and the geometry of the weights are logged for the layer that feeds an ``nn.Linear`` classifier, and
    their subspace versions for one that feeds a ``GrassmannLinear``.

    Args:
        layer: dotted name of a submodule, or several; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``lightning_feat.taps.pool``.
        num_classes: number of classes; None takes that of the classifier.
        mode: see above.
        data: for the exact mode, the ``"train"`` data, the ``"val"`` data (logged as ``neural_collapse_val/...``), or
            ``"both"``.
        every_n_epochs: for the exact mode: after the first epoch, every n-th and the last; ``"log"`` for epochs 1, 2,
            3, 4, 6, 8, 12, 16, 24, ... and the last.
        measures: patterns of the names to log, ``["*"]`` for all; None for one or two of each kind.
        classifier: dotted name of the classifier where it cannot be found; its outputs are the logits of NC4.
        target_key: where a batch keeps class indices ``(N,)`` or soft labels ``(N, C)``, see
            ``lightning_feat.batches``. The targets must belong to the features: with mixup inside ``training_step``
            use the exact mode.
        ignore_index: samples with this target are left out.
        global_mean: what class means are centred by: the mean of the class means, or of all samples.
        second_moment: for the online mode, keep the ``(D, D)`` moment that NC1 by pseudo-inverse needs; None: up to D
            = 512.
        forward: for the exact mode, ``forward(module, batch)`` that runs the network; None calls ``module(batch[0])``
            for a tuple or list, else ``module(batch)``.
        memory_budget_mb: for the exact mode, what kept features may take on each process.
    """

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
    ) -> None:
        if mode not in ("online", "exact") or data not in ("train", "val", "both"):
            raise ValueError(f"mode={mode!r}, data={data!r}: choose 'online' or 'exact', and 'train', 'val' or 'both'.")
        if every_n_epochs != "log" and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1, or 'log'.")
        if mode == "online" and data != "train":
            raise ValueError(
                "the online mode sees training batches only: for data='val' or 'both' choose mode='exact'."
            )
        layers: list[str | None] = [*layer] if isinstance(layer, list) else [layer]
        if len(set(layers)) < len(layers) or not layers:
            raise ValueError(f"layer={layer}: name each layer once, and at least one.")
        self.taps = LabelledTaps(layers, read, pooling, classifier, target_key, ignore_index)
        self.num_classes = num_classes
        self.mode, self.data, self.every_n_epochs = mode, data, every_n_epochs
        self.measures = tuple(measures) if measures is not None else DEFAULT_MEASURES
        self.global_mean, self.second_moment = global_mean, second_moment
        self.forward = forward
        self.memory_budget_mb = memory_budget_mb
        self._online: dict[str, NeuralCollapse] = {}
        self._warned = False

    @property
    def state_key(self) -> str:
        return f"NeuralCollapseMonitor[{self.mode}, {', '.join(self.taps.labels)}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: before configure_model the layers may not be there, or be replaced later.
        self._online, self._warned = {}, False
        self.taps.attach(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for metric in self._online.values():
            metric.reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mode == "online":
            self.taps.listen()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.taps.hold()  # SAM runs training_step twice: the features at the perturbed weights are not wanted

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.mode != "online":
            return
        try:
            heard = self.taps.take(batch)
        except TapError:
            if self._online:
                return  # a step may skip the network now and then
            raise
        for label, (features, targets) in heard.labelled.items():
            metric = self._metric(self._online, label, pl_module, features, self._keep_moment(features))
            metric.update(features, targets, self._repeated(trainer, len(features), batch, batch_idx))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mode == "online":
            for label, metric in self._online.items():
                self._report(trainer, pl_module, metric, label, "neural_collapse")
        elif self._is_due(trainer):
            if self.data in ("train", "both"):
                self._measure(trainer, pl_module, trainer.train_dataloader, "training", "neural_collapse")
            if self.data in ("val", "both"):
                self._measure(trainer, pl_module, trainer.val_dataloaders, "validation", "neural_collapse_val")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()  # after an exception Lightning does not call teardown

    def _measure(self, trainer: Trainer, module: LightningModule, loader: Any, name: str, method: str) -> None:
        """The exact mode: one pass for the sums, and what needs the class means from kept features or a second pass."""
        clean = clean_loader(trainer, loader, name)
        metrics: dict[str, NeuralCollapse] = {}
        kept: list[Heard] | None = []
        free = self.memory_budget_mb * 2**20
        with without_trace(trainer, module):
            for batch in self._forwards(trainer, module, clean):
                heard = self.taps.take(batch)
                for label, (features, targets) in heard.labelled.items():
                    self._metric(metrics, label, module, features, moment=False).update(features, targets)
                    free -= features.nbytes
                free -= 0 if heard.logits is None else heard.logits.nbytes
                if kept is not None and free >= 0:
                    kept.append(heard)
                elif kept is not None:
                    kept = None
                    rank_zero_info(
                        f"neural collapse: the features of the {name} data exceed "
                        f"memory_budget_mb={self.memory_budget_mb:g}, so the network runs over them twice."
                    )
            self._complete(trainer, module, metrics)
            for metric in metrics.values():
                metric.start_second_pass()
            for heard in kept if kept is not None else self._second_pass(trainer, module, clean):
                for label, (features, targets) in heard.labelled.items():
                    logits = heard.logits if self.taps.feeds[label] else None
                    metrics[label].update_second_pass(features, targets, logits)
        for label, metric in metrics.items():
            self._report(trainer, module, metric, label, method)

    def _forwards(self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> Any:
        for batch in clean_batches(trainer, module, loader):
            self.taps.listen()
            run_forward(trainer, module, batch, self.forward)
            yield batch

    def _second_pass(self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> Any:
        for batch in self._forwards(trainer, module, loader):
            yield self.taps.take(batch)

    def _complete(self, trainer: Trainer, module: LightningModule, metrics: dict[str, NeuralCollapse]) -> None:
        """Let a process without a sample take part in the sums: all must know the width of the features."""
        for label in self.taps.labels:
            width = metrics[label].num_features if label in metrics else 0
            widest = int(trainer.strategy.reduce(torch.tensor(width, device=module.device), reduce_op="max"))
            if width == 0:
                self._metric(metrics, label, module, torch.zeros(0, widest, device=module.device), moment=False)
            feeds = torch.tensor(self.taps.feeds.get(label, False), dtype=torch.int, device=module.device)
            self.taps.feeds[label] = bool(trainer.strategy.reduce(feeds, reduce_op="max"))

    def _metric(
        self, metrics: dict[str, NeuralCollapse], label: str, module: nn.Module, features: Tensor, moment: bool
    ) -> NeuralCollapse:
        if label not in metrics:
            num_classes = self.taps.count_classes(module) if self.num_classes is None else self.num_classes
            metric = NeuralCollapse(num_classes, features.shape[1], moment, self.global_mean)
            metrics[label] = metric.to(features.device)
        return metrics[label]

    def _keep_moment(self, features: Tensor) -> bool:
        return features.shape[1] <= _WIDEST_ONLINE_MOMENT if self.second_moment is None else self.second_moment

    def _report(
        self, trainer: Trainer, module: LightningModule, metric: NeuralCollapse, label: str, method: str
    ) -> None:
        if self.taps.feeds.get(label, False) and self.taps.head is not None:
            head = self.taps.head[1]
            if isinstance(head, GrassmannLinear):
                metric.set_classifier(basis=full_tensor(head.basis))
            elif isinstance(head, nn.Linear):
                metric.set_classifier(
                    weight=full_tensor(head.weight), bias=None if head.bias is None else full_tensor(head.bias)
                )
        values = metric.compute()
        lost = int(values.pop("nonfinite_samples"))
        if lost and not self._warned:
            self._warned = True
            share = lost / (lost + float(metric.counts.sum()) * trainer.world_size)
            rank_zero_warn(
                f"neural collapse: {share:.1%} of the features of layer {label} in epoch {trainer.current_epoch} were "
                "NaN or inf and are left out of the measures."
            )
        for name, value in values.items():
            if any(fnmatchcase(name, pattern) for pattern in self.measures):
                # compute() agrees on all processes already; sync_dist only spares the reader a warning from Lightning.
                module.log(f"{method}/{name}/{label}", value.float(), sync_dist=True)

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        if epoch == 1 or epoch == trainer.max_epochs or trainer.should_stop:
            return True
        if self.every_n_epochs == "log":
            return epoch & (epoch - 1) == 0 or (epoch % 3 == 0 and (epoch // 3) & (epoch // 3 - 1) == 0)
        return epoch % self.every_n_epochs == 0

    def _repeated(self, trainer: Trainer, num_samples: int, batch: Any, batch_idx: int) -> Tensor | None:
        """Which samples of this batch the sampler repeats; None where that is not so, or not known."""
        targets = targets_of(batch, self.taps.target_key)
        if num_samples != len(targets):
            return None  # several views or tokens of a sample, or samples that are ignored
        return repeated_rows(trainer, batch_idx, num_samples, targets.device)

    def _let_go(self) -> None:
        self.taps.remove()
        self._online = {}
