from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_feat.callbacks.grassmann.spread import FeatureSpread
from lightning_feat.functional.transfer.class_separation import sample_of_each_class
from lightning_feat.joints.data.processes import gather_samples
from lightning_feat.joints.data.shared_pass import Again

_Samples = tuple[Tensor, Tensor, Tensor]  # features, targets, and their numbers in the data set


class SeparationReading:
    """The exact mode of ``GrassmannMonitor``: R^2 from sums, the variability from samples of all processes.

    Args:
        trainer: knows the processes.
        module: the network.
        spread: to be filled; its variability keeps what one process gives it to itself.
        max_samples_per_class: see ``GrassmannMonitor``, and there ``seed``.
    """

    title = "Class separation"

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        spread: FeatureSpread,
        max_samples_per_class: int | None,
        seed: int,
    ) -> None:
        self._trainer, self._module, self._spread, self.taps = trainer, module, spread, [spread.tap]
        self._most, self._seed = max_samples_per_class, seed
        self._kept: list[_Samples] = []
        self._seen, self._held, self._room = 0, 0, 2**14

    def take(self, batch: Any) -> None:
        h, t, left_out = self._spread.take(batch)
        keep, world = ~left_out, self._trainer.world_size
        places = torch.arange(self._seen, self._seen + len(h), device=h.device)
        self._spread.r2.update(h[keep], t[keep])
        self._kept.append((h[keep], t[keep], (self._trainer.global_rank + world * places)[keep]))
        self._seen, self._held = self._seen + len(h), self._held + int(keep.sum())
        if self._held > self._room:  # choose from twice what was chosen before, so that all choices cost but little
            self._kept = [self._sample(_joined(self._kept))]
            self._held = len(self._kept[0][0])
            self._room = max(self._room, 2 * self._held)

    def finish(self, again: Again) -> None:
        device = self._module.device
        none = torch.zeros(0, dtype=torch.long, device=device)
        mine = self._sample(_joined(self._kept)) if self._kept else (torch.zeros(0, 1, device=device), none, none)
        self._kept = []
        h, t, _ = self._sample(gather_samples(*mine))
        self._spread.variability.update(h, t)

    def _sample(self, samples: _Samples) -> _Samples:
        if self._most is None:
            return samples
        features, targets, indices = samples
        chosen = sample_of_each_class(targets, self._most, self._seed, indices)
        return features[chosen], targets[chosen], indices[chosen]


def _joined(parts: list[_Samples]) -> _Samples:
    features, targets, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, targets, indices
