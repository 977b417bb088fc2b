"""How many directions features use, as one number: the exponential of the entropy of a spectrum.

Shapes: N samples, D features, S groups.
"""

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import (
    check_target_range,
    class_sums,
    present_class_means,
    to_float64,
)
from lightning_feat.functional.common.effective_rank import effective_rank
from lightning_feat.functional.common.shapes import check_shapes


def rankme(features: Tensor, epsilon: float = 0.0) -> Tensor:
    """RankMe: the effective rank of the singular values of the feature matrix, which is not centred.

    Between one and the smaller of N and D. It is made to compare pre-trainings by without labels; a layer whose mean is
    far from zero has a low one. Source: Garrido et al., "RankMe: assessing the downstream performance of pretrained
    self-supervised representations by their rank", ICML 2023, arXiv 2210.02885. Over a whole data set, from sums:
    ``effective_rank(covariance_spectrum(totals, centered=False).sqrt())``.

    Args:
        features: ``(N, D)``.
        epsilon: see :func:`effective_rank`; the paper's is 1e-7.

    Returns:
        Scalar, float64; nan without samples, or where all are zero or one is not finite.

    Raises:
        ValueError: if the shape does not fit.

    Example:
        >>> rankme(torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
        tensor(2., dtype=torch.float64)
    """
    check_shapes(features=(features, "ND"))
    h_ND = to_float64(features)
    if h_ND.numel() == 0 or not h_ND.isfinite().all():
        return h_ND.new_full((), torch.nan)
    return effective_rank(torch.linalg.svdvals(h_ND), epsilon)


def lidar(features: Tensor, groups: Tensor, delta: float = 1e-4, epsilon: float = 0.0) -> Tensor:
    r"""LiDAR: the effective rank of what tells groups apart, beside how far the members of a group differ.

    .. math:: \lambda = \text{eigenvalues of } \Sigma_w^{-1/2} \Sigma_b \Sigma_w^{-1/2}, \quad
        \Sigma_b = \frac{1}{S - 1} \sum_g (m_g - m)(m_g - m)^\top, \quad
        \Sigma_w = \frac{1}{N - S} \sum_i (h_i - m_{g(i)})(h_i - m_{g(i)})^\top + \delta I

    with the mean m of the group means. A group is one image, and its members are views of it under augmentation;
    with classes as groups it is the rank of a linear discriminant analysis, at most S - 1. Source: Thilak et al.,
    "LiDAR: sensing linear probing performance in joint embedding SSL architectures", ICLR 2024, arXiv 2312.04000.

    Args:
        features: ``(N, D)``.
        groups: ``(N,)`` indices of the groups, from zero.
        delta: see above; the paper's is 1e-4.
        epsilon: see :func:`effective_rank`.

    Returns:
        Scalar, float64; nan with fewer than two groups, without a group of two, where all group means agree, or where
        a feature is not finite.

    Raises:
        ValueError: if shapes do not fit, an index is below zero, or delta is not above zero.
    """
    check_shapes(features=(features, "ND"), groups=(groups, "N", int))
    if delta <= 0:
        raise ValueError(f"{delta=} must be above zero: the spread within groups may be singular.")
    h_ND = to_float64(features)
    nan = h_ND.new_full((), torch.nan)
    if h_ND.numel() == 0 or not h_ND.isfinite().all():
        return nan
    check_target_range(groups, int(groups.max()) + 1)
    _, index_N = groups.to(h_ND.device).unique(return_inverse=True)
    num_groups = int(index_N.max()) + 1
    if num_groups < 2 or len(h_ND) <= num_groups:
        return nan
    mean_SD = present_class_means(class_sums(h_ND, index_N, num_groups))
    within_ND = h_ND - mean_SD[index_N]
    between_SD = mean_SD - mean_SD.mean(0)
    within_DD = within_ND.T @ within_ND / (len(h_ND) - num_groups)
    within_DD.diagonal().add_(delta)
    # Singular values of the whitened means: their squares are the eigenvalues, and none comes out below zero.
    whitened_DS = torch.linalg.solve_triangular(torch.linalg.cholesky(within_DD), between_SD.T, upper=False)
    return effective_rank(torch.linalg.svdvals(whitened_DS).square(), epsilon)
