"""How many directions features use, over everything seen since ``reset``: the state is first and second moments."""

from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.spectrum import (
    MomentSums,
    add_moment_sums_,
    covariance_spectrum,
    effective_rank,
    empty_moment_sums,
    spectral_decay,
    wasserstein_uniformity_of_sums,
)
from lightning_feat.joints.arguments import checked
from lightning_feat.metrics.common import SumsMetric, at_least_one


class MomentSumsMetric(SumsMetric):
    """Count, sum and second moment of the features, added in place: ``8 D (D + 1)`` bytes, and as many for what
    ``reset`` restores. A batch costs ``2 N D^2`` operations in float64.

    Args:
        num_features: width D of the features.
        **kwargs: those of ``torchmetrics.Metric``. A ``dist_sync_fn`` must suit states that are sums.
    """

    _prefix = "moment_"
    nonfinite: Tensor

    @checked
    def __init__(self, num_features: int, **kwargs: Any) -> None:
        (num_features,) = at_least_one(num_features=num_features)
        super().__init__(**kwargs)
        self.num_features = num_features
        for name, zeros in empty_moment_sums(num_features)._asdict().items():
            self._add_sum(self._prefix + name, *zeros.shape)
        self._add_sum("nonfinite")

    def update(self, features: Tensor, repeated: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: ``(N, D)``, any floating dtype. Samples that are not finite are left out and counted.
            repeated: ``(N,)`` mask of samples that a distributed sampler repeats to even out the processes, left out
                here; :func:`~lightning_feat.functional.common.class_sums.repeated_by_sampler` makes it.

        Raises:
            ValueError: if shapes do not fit.
        """
        self._make_writable()
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"num_features={self.num_features} but features are {tuple(features.shape)}: they must be (N, D); "
                f"set num_features to the width of the layer, and pool or flatten feature maps first."
            )
        if repeated is not None and repeated.shape != features.shape[:1]:
            raise ValueError(f"repeated must be ({len(features)},), one for each sample, got {tuple(repeated.shape)}")
        features = to_float64(features.detach())
        left_out_N = ~vector_norm(features, dim=1).isfinite()
        if repeated is not None:
            repeated_N = repeated.to(features.device, torch.bool)
            self.nonfinite += (left_out_N & ~repeated_N).sum()
            left_out_N = left_out_N | repeated_N
        else:
            self.nonfinite += left_out_N.sum()
        features = self._prepared(features.masked_fill(left_out_N[:, None], 0))
        add_moment_sums_(self._totals(), features, (~left_out_N).double())

    def _prepared(self, features: Tensor) -> Tensor:
        return features

    def _totals(self) -> MomentSums:
        return MomentSums(*(getattr(self, self._prefix + name) for name in MomentSums._fields))

    def spectrum(self, centered: bool = True) -> Tensor:
        """Eigenvalues ``(D,)`` of the covariance, the largest first, of what this process has seen; after a ``sync``,
        of what all have.
        """
        return covariance_spectrum(self._totals(), centered)


class EffectiveRank(MomentSumsMetric):
    """Effective rank of the centred features, of everything seen since ``reset``: between one and D.

    The exponential of the entropy of their singular values, see
    :func:`~lightning_feat.functional.spectrum.effective_rank`. The arguments are those of ``num_features`` and
    ``torchmetrics.Metric``, see :class:`MomentSumsMetric`.

    Example:
        >>> metric = EffectiveRank(num_features=3)
        >>> print(f"{metric(torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, -1.0, 5.0]])):.6f}")
        2.000000
    """

    plot_lower_bound = 1.0

    def compute(self) -> Tensor:
        """The effective rank, the same scalar on every process; nan without samples, or where all are the same."""
        return effective_rank(self.spectrum().sqrt())


class RankMe(MomentSumsMetric):
    """RankMe of everything seen since ``reset``: the effective rank of the features, which are not centred.

    See :func:`~lightning_feat.functional.spectrum.rankme`, and :class:`MomentSumsMetric` for the arguments.

    Example:
        >>> metric = RankMe(num_features=2)
        >>> print(f"{metric(torch.tensor([[3.0, 0.0], [0.0, 3.0]])):.6f}")
        2.000000
    """

    higher_is_better = True
    plot_lower_bound = 1.0

    def compute(self) -> Tensor:
        """RankMe, the same scalar on every process; nan without samples, or where all are zero."""
        return effective_rank(self.spectrum(centered=False).sqrt())


class SpectrumDecay(MomentSumsMetric):
    """Exponent of the power law that the eigenvalues of the covariance follow, of everything seen since ``reset``.

    See :func:`~lightning_feat.functional.spectrum.spectral_decay`.

    Args:
        num_features: width D of the features.
        first: index of the first eigenvalue that counts, from one.
        last: index of the last one; None for the last above zero.
        **kwargs: those of ``torchmetrics.Metric``.

    Raises:
        ValueError: if the range does not fit, or holds fewer than three eigenvalues.
    """

    @checked
    def __init__(self, num_features: int, first: int = 1, last: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        spectral_decay(torch.ones(self.num_features), first, last)  # refuses a range that does not fit
        if min(last or self.num_features, self.num_features) - first < 2:
            raise ValueError(
                f"{first=} and {last=} of {self.num_features} eigenvalues: fewer than three are left, and no law can "
                "be fitted. Take a wider range."
            )
        self.first, self.last = first, last

    def compute(self) -> Tensor:
        """The exponent, the same scalar on every process; nan with fewer than three eigenvalues above zero."""
        return spectral_decay(self.spectrum(), self.first, self.last).exponent


class WassersteinUniformity(MomentSumsMetric):
    """Distance of the directions from an even spread over the sphere, of everything seen since ``reset``.

    See :func:`~lightning_feat.functional.spectrum.wasserstein_uniformity`, and :class:`MomentSumsMetric` for the
    arguments. A feature of length zero counts as one in the middle.

    Example:
        >>> metric = WassersteinUniformity(num_features=2)
        >>> print(f"{metric(torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -2.0]])):.6f}")
        0.000000
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 2**0.5
    _prefix = "unit_moment_"

    def _prepared(self, features: Tensor) -> Tensor:
        return normalize(tamed(features)[0], dim=1)

    def compute(self) -> Tensor:
        """The distance, the same scalar on every process; nan without samples."""
        return wasserstein_uniformity_of_sums(self._totals())
