"""Neural collapse of networks with several regression outputs (NRC1 to NRC3), and the optimum it is measured against.

Source: Andriopoulos et al., "The prevalence of neural collapse in neural multivariate regression", NeurIPS 2024.

Shapes: N samples, D features, n outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.directions import rounding_of, thin_svd
from lightning_feat.functional.common.shapes import check_shapes


class RegressionOptimum(NamedTuple):
    """Free features and a linear head at the minimum, up to a common rotation of the D features."""

    weight_gram: Tensor  # (n, n) W W^T
    bias: Tensor  # (n,)
    predictions: Tensor  # (N, n)


def target_covariance(targets: Tensor) -> Tensor:
    """Covariance ``(n, n)`` of the targets ``(N, n)``, over N and not N - 1."""
    check_shapes(targets=(targets, "Nn"))
    y_Nn = to_float64(targets)
    centered = y_Nn - y_Nn.mean(0)
    return centered.T @ centered / len(y_Nn)


def _outside(features: Tensor, directions_rD: Tensor) -> Tensor:
    """Mean squared part of the normalised features outside orthonormal directions; zero features are left out."""
    norm_N: Tensor = vector_norm(features, dim=1)
    # Not "> 0", which would leave out NaN as well.
    unit_ND = features[norm_N != 0] / norm_N[norm_N != 0, None]
    return (unit_ND - unit_ND @ directions_rD.T @ directions_rD).square().sum(1).mean()


def _rounding(dtype: torch.dtype, direction_rD: Tensor, rows_nD: Tensor) -> Tensor:
    """``(r,)`` how much along each direction the rounding of the rows, kept in this dtype, may make."""
    off = rounding_of(dtype) * (1 + (rows_nD.shape[1] / len(rows_nD)) ** 0.5)
    found: Tensor = off * (direction_rD.square() @ rows_nD.square().sum(0)).sqrt()
    return found


def nrc1(features: Tensor, num_targets: int, centered: bool = True) -> Tensor:
    """Share of the normalised features outside their own top ``num_targets`` principal components, in [0, 1]; nan where
    they have none. Components that hold rounding alone count as none, such as those beyond N - 1 of N samples.

    Args:
        features: ``(N, D)``.
        num_targets: number of outputs n.
        centered: whether the components are those of the features minus their mean; the paper leaves it open.

    Raises:
        ValueError: if ``num_targets`` is not between 1 and D.
    """
    check_shapes(features=(features, "ND"))
    if not 1 <= num_targets <= features.shape[1]:
        raise ValueError(f"num_targets={num_targets}: from 1 to the width of the features, {features.shape[1]}")
    h_ND = to_float64(features)
    basis_ND = h_ND - h_ND.mean(0) if centered else h_ND
    if not basis_ND.isfinite().all() or len(basis_ND) == 0:
        return h_ND.new_full((), torch.nan)
    value_r, direction_rD = thin_svd(basis_ND)
    value_r, direction_rD = value_r[:num_targets], direction_rD[:num_targets]
    kept_r = value_r > _rounding(features.dtype, direction_rD, h_ND)
    return _outside(h_ND, direction_rD[kept_r]) if kept_r.any() else h_ND.new_full((), torch.nan)


def nrc2(features: Tensor, weight: Tensor) -> Tensor:
    """Share of the normalised features ``(N, D)`` outside the row space of the head ``(n, D)``, in [0, 1]."""
    check_shapes(features=(features, "ND"), weight=(weight, "nD"))
    w_nD = to_float64(weight)
    if not w_nD.isfinite().all() or w_nD.numel() == 0:
        return w_nD.new_full((), torch.nan)
    _, value_r, direction_rD = torch.linalg.svd(w_nD, full_matrices=False)
    # Directions that the head leaves empty hold the rounding of the dtype it is kept in.
    return _outside(to_float64(features), direction_rD[value_r > _rounding(weight.dtype, direction_rD, w_nD)])


def _root(covariance: Tensor) -> Tensor:
    covariance = to_float64(covariance)
    if not covariance.isfinite().all():  # eigh would raise
        return torch.full_like(covariance, torch.nan)
    value_n, vector_nn = torch.linalg.eigh(covariance)
    root: Tensor = (vector_nn * value_n.clamp(min=0).sqrt()) @ vector_nn.T
    return root


def nrc3(weight: Tensor, covariance: Tensor, gamma: Tensor | float) -> Tensor:
    r"""Squared distance of :math:`W W^\top` to :math:`\Sigma^{1/2} - \gamma^{1/2} I`, both of unit norm; in [0, 4].

    Args:
        weight: ``(n, D)`` the head.
        covariance: ``(n, n)`` of the targets, :func:`target_covariance`.
        gamma: from :func:`nrc3_best_gamma` of the last head, the same for all epochs.

    Returns:
        Scalar; nan for a single output, where every head fits.
    """
    check_shapes(weight=(weight, "nD"), covariance=(covariance, "nn"))
    w_nD, root_nn = to_float64(weight), _root(covariance)
    if len(w_nD) < 2:
        return w_nD.new_full((), torch.nan)
    gram_nn = w_nD @ w_nD.T
    eye = torch.eye(len(w_nD), dtype=w_nD.dtype, device=w_nD.device)
    target_nn = root_nn - torch.as_tensor(gamma).to(w_nD).sqrt() * eye
    distance: Tensor = matrix_norm(gram_nn / matrix_norm(gram_nn) - target_nn / matrix_norm(target_nn))
    return distance.square()


def nrc3_best_gamma(weight: Tensor, covariance: Tensor) -> Tensor:
    r"""The gamma between 0 and the smallest eigenvalue of the covariance that makes :func:`nrc3` least, in closed form.

    The cosine of :math:`W W^\top` and :math:`\Sigma^{1/2} - t I` has one stationary point in t: it or an end is best.
    """
    check_shapes(weight=(weight, "nD"), covariance=(covariance, "nn"))
    w_nD, root_nn = to_float64(weight), _root(covariance)
    gram_nn = w_nD @ w_nD.T
    inner, trace, size = (gram_nn * root_nn).sum(), gram_nn.trace(), len(gram_nn)
    square, root_trace = root_nn.square().sum(), root_nn.trace()
    stationary = (trace * square - inner * root_trace) / (trace * root_trace - size * inner)
    if not root_nn.isfinite().all():
        return w_nD.new_full((), torch.nan)
    highest = torch.linalg.eigvalsh(root_nn)[0].clamp(min=0)
    ends = torch.stack([torch.zeros_like(highest), highest, stationary.nan_to_num(0.0).clamp(min=0).minimum(highest)])
    errors = torch.stack([nrc3(weight, covariance, end.square()) for end in ends])
    return ends[errors.nan_to_num(torch.inf).argmin()].square()


def nrc3_gamma_from_traces(weight: Tensor, covariance: Tensor) -> Tensor:
    r"""Gamma that gives :math:`\Sigma^{1/2} - \gamma^{1/2} I` the trace of :math:`W W^\top`; zero where none does."""
    check_shapes(weight=(weight, "nD"), covariance=(covariance, "nn"))
    w_nD = to_float64(weight)
    return ((_root(covariance).trace() - w_nD.square().sum()) / len(w_nD)).clamp(min=0).square()


def regression_optimum(targets: Tensor, weight_decay: float, feature_decay: float) -> RegressionOptimum:
    r"""Minimum over free features H, head W and bias b of, with N samples,

    .. math:: \tfrac{1}{2N} \lVert W H + b - Y \rVert^2 + \tfrac{\lambda_H}{2N} \lVert H \rVert^2
              + \tfrac{\lambda_W}{2} \lVert W \rVert^2 .

    With :math:`c = \lambda_H \lambda_W`, :math:`W W^\top = \sqrt{\lambda_H / \lambda_W} (\Sigma^{1/2} - \sqrt{c} I)`
    and the residuals are white; directions in which the targets vary by no more than c are given up. Needs ``D >= n``.

    Raises:
        ValueError: if a decay is not above zero: without it nothing collapses; or if the targets are empty or not
            finite.
    """
    check_shapes(targets=(targets, "Nn"))
    if min(weight_decay, feature_decay) <= 0:
        raise ValueError(f"weight_decay={weight_decay} and feature_decay={feature_decay} must both be above zero")
    y_Nn = to_float64(targets)
    if len(y_Nn) == 0 or not y_Nn.isfinite().all():
        raise ValueError(f"targets {tuple(targets.shape)} must hold samples, and neither NaN nor inf")
    value_n, vector_nn = torch.linalg.eigh(target_covariance(y_Nn))
    spread_n = value_n.clamp(min=0).sqrt()
    kept_n = (spread_n - (weight_decay * feature_decay) ** 0.5).clamp(min=0)
    gram_nn = (feature_decay / weight_decay) ** 0.5 * (vector_nn * kept_n) @ vector_nn.T
    share_n = torch.where(kept_n > 0, kept_n / spread_n, 0.0)
    centered_Nn = y_Nn - y_Nn.mean(0)
    return RegressionOptimum(gram_nn, y_Nn.mean(0), y_Nn.mean(0) + centered_Nn @ (vector_nn * share_n) @ vector_nn.T)


def explained_variance_ratio(features: Tensor, num_components: int = 5) -> Tensor:
    """Share of the variance in each of the first principal components, largest first, ``(num_components,)``.

    Fewer where N or D is less; nan where there is no variance, or features are not finite.
    """
    check_shapes(features=(features, "ND"))
    h_ND = to_float64(features)
    if not h_ND.isfinite().all() or len(h_ND) == 0:  # svdvals would raise
        return h_ND.new_full((min(num_components, *h_ND.shape),), torch.nan)
    value: Tensor = torch.linalg.svdvals(h_ND - h_ND.mean(0)).square()
    return value[:num_components] / value.sum()


def two_neighbor_dimension(features: Tensor) -> Tensor:
    """Intrinsic dimension from the two nearest neighbours of each sample: ``n / sum log(second / first distance)``.

    Compare that of the features with that of the targets: features of the lower dimension are compressed too far to
    generalise ("Geometric properties of neural multivariate regression", arXiv 2510.01105). Maximum likelihood form of
    Facco et al., Scientific Reports 2017; duplicates, up to the rounding of their dtype, are left out. Takes ``8 N^2``
    bytes: a few thousand samples do.

    Args:
        features: ``(N, D)``, features or targets, at least three samples apart.
    """
    check_shapes(features=(features, "ND"))
    h_ND = to_float64(features)
    if len(h_ND) < 3:
        return h_ND.new_full((), torch.nan)
    distance_NN = torch.cdist(h_ND, h_ND, compute_mode="donot_use_mm_for_euclid_dist")
    same_NN = torch.eye(len(h_ND), dtype=torch.bool, device=h_ND.device)
    # Not in place: the gradient of cdist needs its result.
    near_N2 = distance_NN.masked_fill(same_NN, torch.inf).topk(2, largest=False).values
    off_N = rounding_of(features.dtype) * vector_norm(h_ND.detach(), dim=1)
    near_N2 = near_N2[near_N2[:, 0] > off_N]
    return len(near_N2) / (near_N2[:, 1] / near_N2[:, 0]).log().sum()
