"""The best rule that is linear, with which a network is compared.

Shapes: N samples, D numbers in each, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.simplicity_bias.clones import ledoit_wolf_shrinkage


class LinearRule(NamedTuple):
    """Scores of the classes are ``features @ weight.T + bias``."""

    weight: Tensor  # (C, D) float64
    bias: Tensor  # (C,) float64; -inf for a class without samples


@torch.no_grad()
def linear_discriminant(
    features: Tensor, targets: Tensor, num_classes: int, shrinkage: float | None = None
) -> LinearRule:
    r"""Linear discriminant analysis, the best rule for classes that are normal with one covariance.

    With class means :math:`\mu_c`, shares :math:`\pi_c` and the covariance within classes :math:`\Sigma`, the score
    of a class is

    .. math:: \mu_c^T \Sigma^{-1} x - \tfrac12 \mu_c^T \Sigma^{-1} \mu_c + \log \pi_c, \qquad
              \Sigma = (1 - \gamma) S + \gamma \frac{\operatorname{tr} S}{D} I

    It weighs a feature by what it predicts, whatever its size in the input: what it relies on is what a classifier may
    rely on without bias (``shortcut_bias``). Where :math:`\Sigma` has no inverse its pseudo-inverse counts, and where
    it is zero the nearest mean.

    Args:
        features: ``(N, D)`` floating.
        targets: ``(N,)`` class indices.
        num_classes: number of classes C.
        shrinkage: :math:`\gamma` in [0, 1]; None takes ``ledoit_wolf_shrinkage``.

    Raises:
        ValueError: if shapes, class indices or the shrinkage do not fit.

    Cost: a singular value decomposition of ``(N, D)``, in float64.

    Example:
        >>> features = torch.tensor([[0.0, 5.0], [0.2, -5.0], [1.0, 5.0], [1.2, -5.0]])
        >>> weight, bias = linear_discriminant(features, torch.tensor([0, 0, 1, 1]), num_classes=2, shrinkage=0.5)
        >>> (features.double() @ weight.T + bias).argmax(1)
        tensor([0, 0, 1, 1])
    """
    check_shapes(features=(features, "ND"), targets=(targets, "N", int))
    check_target_range(targets, num_classes)
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: give a number in [0, 1], or None.")
    x = features.double()
    targets = targets.long()  # as an index, uint8 is a mask
    count_C = targets.bincount(minlength=num_classes).double()
    mean_CD = x.new_zeros(num_classes, x.shape[1]).index_add_(0, targets, x) / count_C.clamp(min=1)[:, None]
    within = x - mean_CD[targets]
    share = float(ledoit_wolf_shrinkage(within)) if shrinkage is None else shrinkage
    origin_D = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
    centred_CD = mean_CD - origin_D  # differences of large numbers cancel
    weight_CD = mean_CD * torch.nan
    if x.isfinite().all():
        weight_CD = _inverse_times(within / max(len(x), 1) ** 0.5, share, centred_CD)
    bias_C = (count_C / max(len(x), 1)).log() - (weight_CD * centred_CD).sum(1) / 2 - weight_CD @ origin_D
    bias_C = torch.where(count_C > 0, bias_C, -torch.inf)
    return LinearRule(weight_CD * (count_C > 0)[:, None], bias_C)


def _inverse_times(root: Tensor, share: float, rows: Tensor) -> Tensor:
    """Rows times the inverse of the shrunk ``root.T @ root``."""
    total = root.square().sum()
    if not root.numel() or total == 0:
        return rows
    _, singular, axes = torch.linalg.svd(root, full_matrices=False)
    flat = share * float(total) / root.shape[1]
    variance = (1 - share) * singular.square() + flat
    least = max(root.shape) * torch.finfo(torch.float64).eps * float(variance.max())
    inverse = torch.where(variance > least, 1 / variance, 0.0)
    along = rows @ axes.T
    found = (along * inverse) @ axes
    rest = rows - along @ axes
    return found + rest / flat if flat > least else found
