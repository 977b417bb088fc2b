from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_feat.joints.data.shared_pass import Again
from lightning_feat.joints.features.labelled_taps import Heard, LabelledTaps
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.metrics.neural_collapse import NeuralCollapse


class CollapseReading:
    """The exact mode of ``NeuralCollapseMonitor``: one pass for the sums, and what needs the class means from kept
    features or, where these exceed the budget, from a second run of the network.

    Args:
        trainer: knows the processes.
        module: the network.
        name: of the data, in messages: "training" or "validation".
        taps: attached to the module.
        new_metric: makes the metric for features like those it is given.
        memory_budget_mb: see ``NeuralCollapseMonitor``.

    Attributes:
        metrics: for each layer, by its label, on all processes alike; complete after ``finish``.
    """

    title = "Neural collapse"

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        name: str,
        taps: LabelledTaps,
        new_metric: Callable[[Tensor], NeuralCollapse],
        memory_budget_mb: float,
    ) -> None:
        self._trainer, self._module, self._name, self._labelled = trainer, module, name, taps
        self._new_metric, self._budget = new_metric, memory_budget_mb
        self.metrics: dict[str, NeuralCollapse] = {}
        self._kept: list[Heard] | None = []
        self._free = memory_budget_mb * 2**20

    @property
    def taps(self) -> list[FeatureTap]:
        return self._labelled.all_taps

    def take(self, batch: object) -> None:
        heard = self._labelled.take(batch)
        for label, found in heard.labelled.items():
            if label not in self.metrics:
                self.metrics[label] = self._new_metric(found.features)
            self.metrics[label].update(*found.kept(None)[:2])
            self._free -= found.features.nbytes
        self._free -= 0 if heard.logits is None else heard.logits.nbytes
        if self._kept is not None and self._free >= 0:
            self._kept.append(heard)
        elif self._kept is not None:
            self._kept = None
            rank_zero_info(
                f"neural collapse: the features of the {self._name} data exceed memory_budget_mb={self._budget:g}, so "
                "the network runs over them twice."
            )

    def finish(self, again: Again) -> None:
        self._complete()
        for metric in self.metrics.values():
            metric.start_second_pass()
        kept, self._kept = self._kept, None
        # All processes do the same: under FSDP2 each run of the network is a collective, and shares differ in size.
        exceeds = torch.tensor(kept is None, dtype=torch.int, device=self._module.device)
        if bool(self._trainer.strategy.reduce(exceeds, reduce_op="max")):
            kept = None
        for heard in kept if kept is not None else (self._labelled.take(batch) for batch in again()):
            for label, found in heard.labelled.items():
                logits = heard.logits if self._labelled.feeds[label] else None
                if logits is not None and logits.shape != (len(found.features), self.metrics[label].num_classes):
                    logits = None  # one output for two classes, or more outputs than classes: what needs logits is left
                self.metrics[label].update_second_pass(*found.kept(logits))

    def _complete(self) -> None:
        """Let a process without a sample take part in the sums: all must know the width of the features."""
        reduce, device, feeds = self._trainer.strategy.reduce, self._module.device, self._labelled.feeds
        for label in self._labelled.labels:
            width = self.metrics[label].num_features if label in self.metrics else 0
            widest = int(reduce(torch.tensor(width, device=device), reduce_op="max"))
            if width == 0:
                self.metrics[label] = self._new_metric(torch.zeros(0, widest, device=device))
            fed = torch.tensor(feeds.get(label, False), dtype=torch.int, device=device)
            feeds[label] = bool(reduce(fed, reduce_op="max"))
