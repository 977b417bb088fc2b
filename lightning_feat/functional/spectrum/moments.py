"""First and second moments of features: sums that add over batches and processes, and the spectrum that they give.

Shapes: N samples, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import accumulation_device, to_float64
from lightning_feat.functional.common.shapes import check_shapes

_EPS = torch.finfo(torch.float64).eps


class MomentSums(NamedTuple):
    """Sums over samples. Those of two disjoint sets of samples add up, entry by entry, to those of their union."""

    samples: Tensor  # () how many
    sums: Tensor  # (D,) sum of the features
    products: Tensor  # (D, D) sum of the outer product of each feature with itself


def empty_moment_sums(num_features: int, device: torch.device | str | None = None) -> MomentSums:
    """The sums of no samples, float64."""
    shapes: tuple[tuple[int, ...], ...] = ((), (num_features,), (num_features, num_features))
    return MomentSums(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


def add_moment_sums_(totals: MomentSums, features: Tensor, weights: Tensor | None = None) -> MomentSums:
    """Add a batch to ``totals`` in place and return them. The arguments are those of :func:`moment_sums`."""
    check_shapes(features=(features, "ND"), weights=(weights, "N"))
    check_shapes(features=(features, "ND"), sums=(totals.sums, "D"))
    h_ND = to_float64(features)
    weighted_ND = h_ND if weights is None else h_ND * weights.to(h_ND)[:, None]
    totals.samples.add_(len(h_ND) if weights is None else weights.to(h_ND).sum())
    totals.sums.add_(weighted_ND.sum(0))
    totals.products.addmm_(weighted_ND.T, h_ND)
    return totals


def moment_sums(features: Tensor, weights: Tensor | None = None) -> MomentSums:
    """Sum a batch into what the spectrum of a data set needs, in float64, on the device of ``features`` (MPS: the CPU).

    A batch costs ``2 N D^2`` operations, and the sums hold ``8 D^2`` bytes, however many samples there are.

    Args:
        features: ``(N, D)``, any floating dtype; N may be zero.
        weights: ``(N,)`` factor of each sample, zero to leave it out; None counts every sample once.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> moment_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).products
        tensor([[10., 14.],
                [14., 20.]], dtype=torch.float64)
    """
    check_shapes(features=(features, "ND"), weights=(weights, "N"))
    return add_moment_sums_(
        empty_moment_sums(features.shape[1], accumulation_device(features.device)), features, weights
    )


def covariance(totals: MomentSums, centered: bool = True) -> Tensor:
    r"""Covariance :math:`\frac1N \sum_i (h_i - \bar h)(h_i - \bar h)^\top` of what was summed, ``(D, D)``, float64.

    Divided by N, not by N - 1. A mean that is m times the spread costs m^2 of float64's 1e-16.

    Args:
        totals: from :func:`moment_sums`. Without samples all is nan.
        centered: False for the second moment around the origin.
    """
    mean_DD = totals.products / totals.samples
    if centered:
        mean_D = totals.sums / totals.samples
        mean_DD = mean_DD - torch.outer(mean_D, mean_D)
    return (mean_DD + mean_DD.T) / 2


def covariance_spectrum(totals: MomentSums, centered: bool = True) -> Tensor:
    """Eigenvalues ``(D,)`` of the covariance, the largest first, float64.

    Those that only the rounding of the sums has made, below D times 2e-16 of the largest second moment, are zero.

    Args:
        totals: from :func:`moment_sums`. Without samples, or where a feature was not finite, all are nan.
        centered: False for the second moment around the origin; its roots are the singular values of the feature
            matrix over the root of N.

    Example:
        >>> covariance_spectrum(moment_sums(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])))
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    matrix_DD = covariance(totals, centered)
    width = len(matrix_DD)
    if width == 0 or not matrix_DD.isfinite().all():
        return torch.full((width,), torch.nan, dtype=torch.float64, device=matrix_DD.device)
    value_D: Tensor = torch.linalg.eigvalsh(matrix_DD).flip(0)
    size = (totals.products.diagonal().sum() / totals.samples).maximum(value_D[0])  # what the sums were rounded at
    return value_D.where(value_D > width * _EPS * size, 0.0)
