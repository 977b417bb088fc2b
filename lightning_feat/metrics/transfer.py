"""Separation of classes and variability within them, of everything seen since ``reset``: the state is sums."""

from typing import Any

from torch import Tensor

from lightning_feat.functional.transfer.class_separation import (
    PairAngleSums,
    add_direction_sums_,
    class_separation_r2,
    pair_angle_sums,
    within_class_variability,
)
from lightning_feat.joints.arguments import checked
from lightning_feat.metrics.common import ClassSumsMetric, SumsMetric, at_least_one


class ClassSeparation(ClassSumsMetric):
    """Class separation R^2 of everything seen since ``reset``, exact over batches and processes.

    The formula is in :func:`~lightning_feat.functional.transfer.class_separation_r2`. Keeps sums of unit
    features, not samples: ``8 * C * (D + 2)`` bytes, and as many for what ``reset`` restores.

    Example:
        >>> import torch
        >>> metric = ClassSeparation(num_classes=2, num_features=2)
        >>> metric(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 1]))
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = None  # the better it separates its classes, the worse it transfers
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    _prefix = "direction_"

    def _add(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        add_direction_sums_(self._totals(), features, targets, weights)

    def compute(self) -> Tensor:
        """R^2, the same scalar on every process."""
        self._check_outside()
        return class_separation_r2(self._totals(), self._rounding())


class WithinClassVariability(SumsMetric):
    """Mean angle, in degrees, between samples of one class that came in the same call of ``update``.

    All pairs of a data set are those of one call with all of it. With shuffled batches the pairs inside them are a fair
    sample of all, of about ``N (B - 1) / (2 C)`` pairs from N samples in batches of B. Sums of angles and counts, so
    exact for these pairs over batches and processes: ``16 * C`` bytes. A batch costs ``B^2 D`` products in float64.
    The formula is in :func:`~lightning_feat.functional.transfer.class_separation.within_class_variability`.

    Args:
        num_classes: number of classes C, counting those without samples.
        num_features: width D that the features must have; None takes any.
        **kwargs: those of ``torchmetrics.Metric``. A ``dist_sync_fn`` must suit states that are sums.

    Example:
        >>> import torch
        >>> metric = WithinClassVariability(num_classes=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
        >>> metric.compute()
        tensor(90., dtype=torch.float64)
    """

    plot_lower_bound, plot_upper_bound = 0.0, 180.0
    angles: Tensor
    pairs: Tensor

    @checked
    def __init__(self, num_classes: int, num_features: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        (self.num_classes,) = at_least_one(num_classes=num_classes)
        self.num_features = None if num_features is None else at_least_one(num_features=num_features)[0]
        for name in PairAngleSums._fields:
            self._add_sum(name, self.num_classes)

    def update(self, features: Tensor, targets: Tensor, repeated: Tensor | None = None) -> None:
        """Add the pairs within a batch.

        Args:
            features: ``(N, D)``, any floating dtype. Samples that are not finite, or zero, are left out.
            targets: ``(N,)`` class indices in ``[0, num_classes)``.
            repeated: ``(N,)`` mask of samples that a distributed sampler repeats, left out here.

        Raises:
            ValueError: if shapes or dtypes do not fit, or on a CPU a class index is out of range.
        """
        if self.num_features is not None and features.shape[1:] != (self.num_features,):
            raise ValueError(f"num_features={self.num_features} but features are {tuple(features.shape)}: set it so")
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
