from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_feat.functional.feature_shift import ShiftSums, shift_measures, shift_sums
from lightning_feat.joints.reference import Compared


class LayerShift(NamedTuple):
    """What was summed of one layer, over all processes."""

    label: str
    sums: ShiftSums
    lost: float  # tokens that were not finite
    heard: float  # all that count


class EpochShifts:
    """Features of some layers against their reference, summed over the batches of an epoch."""

    def __init__(self) -> None:
        self._totals: dict[str, ShiftSums] = {}
        self._lost: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Forget what was summed."""
        self._totals, self._lost = {}, {}

    def add(self, label: str, pair: Compared) -> None:
        """Add a batch of one layer; what is not finite is counted, and left out."""
        finite_R = pair.features.isfinite().all(-1) & pair.reference.isfinite().all(-1)
        counts_R = finite_R if pair.mask is None else pair.mask & finite_R
        lost_R = ~finite_R if pair.mask is None else pair.mask & ~finite_R
        self._lost[label] = self._lost.get(label, torch.zeros((), device=finite_R.device)) + lost_R.sum()
        sums = shift_sums(pair.features, pair.reference, counts_R)
        before = self._totals.get(label)
        self._totals[label] = sums if before is None else ShiftSums(*(a + b for a, b in zip(before, sums, strict=True)))

    def relative(self) -> list[float]:
        """The relative shift of each layer so far, on this process."""
        return [float(shift_measures(sums)["relative"]) for sums in self._totals.values()]

    def over_processes(self, trainer: Trainer, labels: Sequence[str], device: torch.device) -> Iterator[LayerShift]:
        """The layers that were heard on any process. Nothing where this one has heard none, as then none has."""
        for label in labels if self._totals else ():
            # Each process asks for each layer, in the same order: at a sum one alone would wait for ever.
            nothing = torch.zeros((), device=device)
            sums = self._totals.get(label, [nothing] * 4)
            totals = torch.stack([*sums, self._lost.get(label, nothing).to(sums[0])])
            if trainer.world_size > 1:
                totals = trainer.strategy.reduce(totals, reduce_op="sum")  # type: ignore[assignment]
            used, lost = float(totals[0]), float(totals[4])
            if used + lost:
                yield LayerShift(label, ShiftSums(*totals[:4]), lost, used + lost)
