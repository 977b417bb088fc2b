"""Separation of classes and variability within them, of everything seen since ``reset``: the state is sums."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lightning_feat.functional.common.class_sums import accumulation_device
from lightning_feat.functional.transfer.class_separation import (
    PairAngleSums,
    add_direction_sums_,
    class_separation_r2,
    pair_angle_sums,
    within_class_variability,
)
from lightning_feat.metrics.neural_collapse import _ClassSumsMetric, all_reduce_sum


class ClassSeparation(_ClassSumsMetric):
    """Class separation R^2 of everything seen since ``reset``, exact over batches and processes.

    The formula is in :func:`~lightning_feat.functional.transfer.class_separation_r2`. Keeps sums of unit
    features, not samples: ``8 * C * (D + 2)`` bytes, and as many for what ``reset`` restores.

    Example:
        >>> metric = ClassSeparation(num_classes=2, num_features=2)
        >>> metric(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 1]))
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = None  # the better it separates its classes, the worse it transfers

    def _add(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        add_direction_sums_(self._totals(), features, targets, weights)

    def compute(self) -> Tensor:
        """R^2, the same scalar on every process."""
        self._check_outside()
        return class_separation_r2(self._totals())


class WithinClassVariability(Metric):
    """Mean angle, in degrees, between samples of one class that came in the same call of ``update``.

    All pairs of a data set are those of one call with all of it. With shuffled batches the pairs inside them are a fair
    sample of all, of about ``N (B - 1) / (2 C)`` pairs from N samples in batches of B. Sums of angles and counts, so
    exact for these pairs over batches and processes: ``16 * C`` bytes. A batch costs ``B^2 D`` products in float64.
    The formula is in :func:`~lightning_feat.functional.transfer.class_separation.within_class_variability`.

    Example:
        >>> metric = WithinClassVariability(num_classes=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
        >>> metric.compute()
        tensor(90., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    angles: Tensor
    pairs: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        super().__init__(**{"dist_sync_fn": all_reduce_sum, **kwargs})
        self.num_classes = num_classes
        for name in PairAngleSums._fields:
            self.add_state(name, default=torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[..., Tensor], exclude_state: Any = "") -> Module:
        device = fn(torch.zeros(1)).device
        # A move to a device without float64 (MPS) leaves the sums on the CPU, where they are made.
        return self if accumulation_device(device) != device else super()._apply(fn, exclude_state)

    def update(self, features: Tensor, targets: Tensor, repeated: Tensor | None = None) -> None:
        """Add the pairs within a batch.

        Args:
            features: ``(N, D)``, any floating dtype. Samples that are not finite, or zero, are left out.
            targets: ``(N,)`` class indices in ``[0, num_classes)``.
            repeated: ``(N,)`` mask of samples that a distributed sampler repeats, left out here.

        Raises:
            ValueError: if shapes or dtypes do not fit, or on a CPU a class index is out of range.
        """
        features, weights = features.detach(), None
        if features.ndim == 2:
            usable_N = features.isfinite().all(1)
            if repeated is not None:
                usable_N &= ~repeated.to(usable_N)
            features, weights = features.masked_fill(~usable_N[:, None], 0), usable_N
        for name, value in pair_angle_sums(features, targets, self.num_classes, weights)._asdict().items():
            setattr(self, name, getattr(self, name) + value)  # not in place: a state may stem from inference mode

    def compute(self) -> Tensor:
        """The angle in degrees, the same scalar on every process; nan without a pair."""
        return within_class_variability(PairAngleSums(self.angles, self.pairs))
