from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_feat.functional.common.looks import without_looking
from lightning_feat.joints.data.processes import repeated_rows
from lightning_feat.joints.features.batches import targets_of
from lightning_feat.joints.features.labelled_taps import LabelledTaps
from lightning_feat.joints.features.silence import SilenceWatch
from lightning_feat.joints.features.taps import TapError
from lightning_feat.metrics.neural_collapse import NeuralCollapse


class OnlineSums:
    """The online mode of ``NeuralCollapseMonitor``: the sums of the training batches of an epoch, as they pass.

    Args:
        taps: on the layers.
        silence: gets to know whether anything is heard.
    """

    def __init__(self, taps: LabelledTaps, silence: SilenceWatch) -> None:
        self._taps, self._silence = taps, silence
        self._metrics: dict[str, NeuralCollapse] = {}

    def begin(self) -> None:
        """Forget all layers."""
        self._metrics = {}

    def begin_epoch(self) -> None:
        """Forget the samples of the last epoch."""
        for metric in self._metrics.values():
            metric.reset()

    def take(
        self,
        trainer: Trainer,
        new_metric: Callable[[Tensor], NeuralCollapse],
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add what the taps have heard of a batch; ``new_metric`` makes the metric for features like those heard."""
        try:
            heard = self._taps.take(batch)
        except TapError as error:
            self._silence.note(error, outputs)
            return
        self._silence.heard()
        for label, (features, targets, left_out) in heard.labelled.items():
            if label not in self._metrics:
                self._metrics[label] = new_metric(features)
            repeated = self._repeated(trainer, len(features), batch, batch_idx)
            if repeated is not None and left_out is not None:
                left_out = left_out | repeated
            with without_looking():
                self._metrics[label].update(features, targets, repeated if left_out is None else left_out)

    def by_layer(self) -> list[tuple[str, NeuralCollapse]]:
        """The metrics by layer, in the order of the layers, not as they were first heard."""
        return [(label, self._metrics[label]) for label in self._taps.labels if label in self._metrics]

    def _repeated(self, trainer: Trainer, num_samples: int, batch: Any, batch_idx: int) -> Tensor | None:
        """Which samples of this batch the sampler repeats; None where that is not so, or not known."""
        targets = targets_of(batch, self._taps.target_key)
        if targets.ndim == 0 or num_samples != len(targets):
            return None  # one sample alone, several views or tokens of a sample, or samples that are ignored
        return repeated_rows(trainer, batch_idx, num_samples, targets.device)
