"""NC1: how far the features of a class still vary, against how far the classes are apart.

Every value is a float64 scalar, dimensionless (scaling all features leaves it as it is), zero at full collapse and nan
where the data define none. ``moment`` is :func:`second_moment` of the same samples as ``totals``.

Shapes: N samples, D features, C classes, S classes with samples, R directions that the class means span, P pairs.
"""

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import (
    ClassSums,
    GlobalMean,
    centered_class_means,
    check_batch,
    class_means,
    class_variances,
    has_spread,
    present_class_means,
    to_float64,
)
from lightning_feat.functional.common.directions import FLOAT32_ROUNDING, between_class_directions
from lightning_feat.functional.common.second_pass import CenterSums, ClassCenters
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.neural_collapse.pairs import PairStatistics, pair_statistics


def _nan_like(values: Tensor) -> Tensor:
    return values.new_full((), torch.nan)


def within_class_covariance(totals: ClassSums, moment: Tensor) -> Tensor:
    r"""``(D, D)``: :math:`\Sigma_W = \frac1N \sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top`, over N and not N - C."""
    check_shapes(sums=(totals.sums, "CD"), moment=(moment, "DD"))
    seen_C = totals.counts > 0
    sums_SD = totals.sums[seen_C]
    return (moment - sums_SD.T @ (sums_SD / totals.counts[seen_C, None])) / totals.counts.sum()


def within_class_scatter(
    features: Tensor, targets: Tensor, centers: ClassCenters, weights: Tensor | None = None
) -> Tensor:
    r""":math:`\sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top`, ``(D, D)`` float64, of a batch of the second pass.

    Over the number of samples it is :func:`within_class_covariance`, but subtracts before it squares, so that the
    spectrum stays right where classes have collapsed. The arguments are those of ``center_sums``; soft targets, by
    which a sample belongs to several classes, subtract only the global mean first.
    """
    check_shapes(features=(features, "ND"), origin=(centers.origin, "D"))
    check_batch(features, targets, len(centers.seen), weights)
    h_ND, targets = to_float64(features) - centers.origin, targets.to(centers.origin.device)
    weight_N = h_ND.new_ones(len(h_ND)) if weights is None else weights.to(h_ND)
    if targets.ndim == 1:
        residual_ND = h_ND - centers.offsets[targets.long()]
        return (residual_ND * weight_N[:, None]).T @ residual_ND
    member_NC = targets.double() * weight_N[:, None]
    cross_DD = h_ND.T @ member_NC @ centers.offsets
    means_DD = (centers.offsets * member_NC.sum(0)[:, None]).T @ centers.offsets
    return (h_ND * member_NC.sum(1, keepdim=True)).T @ h_ND - cross_DD - cross_DD.T + means_DD


def nc1_pinv(
    totals: ClassSums, moment: Tensor, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> Tensor:
    r""":math:`\mathrm{tr}(\Sigma_W \Sigma_B^+)`, not divided by the number of classes.

    :math:`\Sigma_B = \frac1S \sum_c m_c m_c^\top` counts every class once. Its pseudo-inverse keeps the (at most S - 1)
    directions of the class means alone, without those that are only ``rounding`` (see ``rounding_of``). Source: Papyan,
    Han, Donoho, PNAS 2020.
    """
    check_shapes(sums=(totals.sums, "CD"), moment=(moment, "DD"))
    value_R, direction_RD = between_class_directions(totals, global_mean, rounding)
    if len(value_R) == 0:
        return _nan_like(totals.counts)
    within_R = (direction_RD @ within_class_covariance(totals, moment) * direction_RD).sum(1).clamp(min=0)
    return _or_nan((totals.counts > 0).sum() * (within_R / value_R.square()).sum(), totals)


def nc1_pinv_over_k(
    totals: ClassSums, moment: Tensor, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> Tensor:
    """:func:`nc1_pinv` divided by the number of classes with samples. Source: Zhu et al., NeurIPS 2021."""
    return nc1_pinv(totals, moment, global_mean, rounding) / (totals.counts > 0).sum()


def nc1_projected_over_k(totals: ClassSums, residuals: CenterSums) -> Tensor:
    r"""The value of :func:`nc1_pinv_over_k` from a second pass, without a ``(D, D)`` matrix.

    :math:`\mathrm{tr}(\Sigma_W \Sigma_B^+) = \frac{S}{N} \sum_i \lVert M^+ (h_i - \mu_{y_i}) \rVert^2`. It subtracts
    before it squares, so it stays exact where classes have collapsed to the last bits. The global mean, and what counts
    as rounding, are those that the centers were made with.
    """
    seen_C = totals.counts > 0
    return _or_nan(residuals.projected[seen_C].sum() / totals.counts.sum(), totals)


def nc1_projected_over_k_balanced(totals: ClassSums, residuals: CenterSums) -> Tensor:
    """:func:`nc1_projected_over_k` with every class counted once: the mean of the within-class covariances of classes.

    In the plain form the classes with most samples decide.
    """
    seen_C = totals.counts > 0
    return _or_nan((residuals.projected / totals.counts)[seen_C].mean(), totals)


def _or_nan(value: Tensor, totals: ClassSums) -> Tensor:
    return torch.where(has_spread(totals) & ((totals.counts > 0).sum() > 1), value, torch.nan)


def _variances(totals: ClassSums, residuals: CenterSums | None) -> Tensor:
    return class_variances(totals, None if residuals is None else residuals.residual_squares)


def nc1_quotient(totals: ClassSums, global_mean: GlobalMean = "classes", residuals: CenterSums | None = None) -> Tensor:
    r""":math:`\mathrm{tr}\,\Sigma_W / \mathrm{tr}\,\Sigma_B`. Source: Tirer, Huang, Niles-Weed, ICML 2023.

    From the sums alone it has a floor of some 1e-15 of the mean squared length of the features over
    :math:`\mathrm{tr}\,\Sigma_B`; the ``residuals`` of a second pass lift it.
    """
    seen_C = totals.counts > 0
    within = (_variances(totals, residuals) * totals.counts)[seen_C].sum() / totals.counts.sum()
    return _or_nan(within / centered_class_means(totals, global_mean).square().sum(1).mean(), totals)


def nc1_quotient_balanced(
    totals: ClassSums, global_mean: GlobalMean = "classes", residuals: CenterSums | None = None
) -> Tensor:
    """:func:`nc1_quotient` with the plain mean of the class variances: every class counts once."""
    seen_C = totals.counts > 0
    within = _variances(totals, residuals)[seen_C].mean()
    return _or_nan(within / centered_class_means(totals, global_mean).square().sum(1).mean(), totals)


def cdnv_matrix(totals: ClassSums) -> Tensor:
    r"""One-sided CDNV of every pair, ``(S, S)``: :math:`\sigma_i^2 / \lVert \mu_i - \mu_j \rVert^2`; nan where i = j.

    The two-sided form is the mean of this matrix and its transpose, so over all pairs the two have the same average.
    """
    seen_C = totals.counts > 0
    mean_SD = class_means(totals)[seen_C]
    distance_SS = torch.cdist(mean_SD, mean_SD, compute_mode="donot_use_mm_for_euclid_dist")
    same_SS = torch.eye(len(mean_SD), dtype=torch.bool, device=mean_SD.device)
    # Filled before the division as well: the gradient of 0 / 0 is nan, whatever becomes of the result.
    value_SS = class_variances(totals)[seen_C, None] / distance_SS.square().masked_fill(same_SS, 1.0)
    return value_SS.masked_fill(same_SS, torch.nan)


def _cdnv_statistics(totals: ClassSums, residuals: CenterSums | None) -> PairStatistics:
    variance_S = _variances(totals, residuals)[totals.counts > 0]
    return pair_statistics(centered_class_means(totals), ["cdnv"], variance_S)["cdnv"]


def class_distance_normalized_variance(totals: ClassSums, residuals: CenterSums | None = None) -> Tensor:
    r"""CDNV, the spread of two classes over their squared distance, averaged over pairs.

    .. math:: V_{ij} = (\sigma_i^2 + \sigma_j^2) / (2 \lVert \mu_i - \mu_j \rVert^2)

    with :math:`\sigma_i^2` the mean squared distance of class i to its mean :math:`\mu_i` (over n, not n - 1). Moving
    all features leaves it as it is; classes without samples are left out. From the sums alone it has the floor of
    :func:`nc1_quotient`, which the ``residuals`` of a second pass lift.
    Source: Galanti, Gyorgy, Hutter, "On the role of neural collapse in transfer learning", ICLR 2022.

    Returns:
        Scalar, float64, never negative; nan with fewer than two classes or where no class has two samples, inf or nan
        where two class means coincide.
    """
    return _or_nan(_cdnv_statistics(totals, residuals).mean, totals)


def cdnv_worst_pair(totals: ClassSums, residuals: CenterSums | None = None) -> Tensor:
    """The largest two-sided CDNV of any pair of classes: the two that are told apart worst."""
    return _or_nan(_cdnv_statistics(totals, residuals).largest, totals)


def variability_collapse_index(
    totals: ClassSums, moment: Tensor, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> Tensor:
    r"""VCI, :math:`1 - \mathrm{tr}(\Sigma_T^+ \Sigma_B) / \mathrm{rank}\,\Sigma_B` with
    :math:`\Sigma_T = \Sigma_W + \Sigma_B`; in [0, 1], and unchanged by any invertible linear map of the features.

    It is the error of the best linear probe, which fits any N samples where they span N - 1 directions: there it is
    nan, and with not many more samples than features it is too small, by the factor 1 - D / (N - 1) for noise. Costs
    the eigenvectors of a ``(D, D)`` matrix. Source: Xu and Liu, "Quantifying the variability collapse of neural
    networks", ICML 2023.
    """
    check_shapes(sums=(totals.sums, "CD"), moment=(moment, "DD"))
    # What rounding leaves of the raw second moment, of which the covariance is a difference.
    floor = torch.finfo(torch.float64).eps * len(moment) * moment.diagonal().sum() / totals.counts.sum()
    return _collapse_index(totals, within_class_covariance(totals, moment), floor, global_mean, rounding)


def vci_from_scatter(
    totals: ClassSums, scatter: Tensor, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> Tensor:
    """:func:`variability_collapse_index` from the :func:`within_class_scatter` of a second pass, without a floor."""
    check_shapes(sums=(totals.sums, "CD"), scatter=(scatter, "DD"))
    within_DD = scatter / totals.counts.sum()
    floor = torch.finfo(torch.float64).eps * len(scatter) * within_DD.diagonal().sum()
    return _collapse_index(totals, within_DD, floor, global_mean, rounding)


def _collapse_index(
    totals: ClassSums, within_DD: Tensor, floor: Tensor, global_mean: GlobalMean, rounding: float
) -> Tensor:
    value_R, direction_RD = between_class_directions(totals, global_mean, rounding)
    size = totals.counts.sum()
    if len(value_R) == 0 or not has_spread(totals) or not within_DD.isfinite().all():
        return _nan_like(totals.counts)
    mean_SD, counts_S = present_class_means(totals), totals.counts[totals.counts > 0]
    root_RD = direction_RD * value_R[:, None] / len(mean_SD) ** 0.5  # its square is that of Sigma_B
    value_D, vector_DD = torch.linalg.eigh(within_DD + root_RD.T @ root_RD)
    # As in between_class_directions, of samples in place of class means.
    square_D = within_DD.diagonal().clamp(min=0) + counts_S @ mean_SD.square() / size
    off_D = (rounding * (1 + (len(value_D) / size).sqrt())) ** 2 * (square_D @ vector_DD.square())
    kept_D = value_D > off_D + floor
    if kept_D.sum() >= size - 1:
        return _nan_like(totals.counts)
    whitening_DK = vector_DD[:, kept_D] / value_D[kept_D].sqrt()
    # 1 - tr(...) / R as a mean of shares of the spread within classes: a difference from one would lose what is small.
    plane_KR = torch.linalg.qr((root_RD @ whitening_DK).T).Q
    probe_DR = whitening_DK @ plane_KR
    unexplained: Tensor = (probe_DR * (within_DD @ probe_DR)).sum() / len(value_R)
    return unexplained.clamp(0, 1)


def between_class_spectrum(
    totals: ClassSums, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> Tensor:
    r"""Eigenvalues of :math:`\Sigma_B`, largest first, ``(R,)`` with R at most S - 1; others are zero or rounding."""
    value_R, _ = between_class_directions(totals, global_mean, rounding)
    return value_R.square() / (totals.counts > 0).sum()


def within_class_spectrum(totals: ClassSums, moment: Tensor) -> Tensor:
    r"""Eigenvalues of :math:`\Sigma_W`, largest first, ``(D,)``; rounding below zero is set to zero."""
    return covariance_spectrum(within_class_covariance(totals, moment))


def covariance_spectrum(covariance: Tensor) -> Tensor:
    """Eigenvalues of a ``(D, D)`` covariance, largest first; rounding below zero is set to zero, nan where undefined.

    Takes 0.15 s at D = 1024 and 0.7 s at D = 2048 on one CPU core.
    """
    check_shapes(covariance=(covariance, "DD"))
    if not covariance.isfinite().all():
        return covariance.new_full(covariance.shape[:1], torch.nan)
    value_D: Tensor = torch.linalg.eigvalsh(covariance).flip(0)
    return value_D.clamp(min=0)


def between_effective_rank(
    totals: ClassSums, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> Tensor:
    """Number of directions that the class means fill: the exponential of the entropy of their normalised spectrum.

    Between 1 (all on a line) and S - 1 (a simplex). The spectrum is that of the scatter matrix: squared singular values
    of the centred means. Rounding weighs nothing in it, but where all means coincide up to it: that is nan. Source: Roy
    and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    mean_SD = centered_class_means(totals, global_mean)
    if len(mean_SD) < 2 or mean_SD.shape[1] == 0 or not mean_SD.isfinite().all():
        return _nan_like(totals.counts)
    wide = mean_SD.shape[0] <= mean_SD.shape[1]
    value_r = torch.linalg.eigvalsh(mean_SD @ mean_SD.T if wide else mean_SD.T @ mean_SD)
    value_r = value_r[value_r > torch.finfo(value_r.dtype).eps * len(value_r) * value_r[-1]]  # zero has no slope
    spread, squares = value_r.sum(), present_class_means(totals).square().sum()
    rank: Tensor = torch.special.entr(value_r / spread).sum().exp()
    return torch.where(spread > rounding**2 * squares, rank, torch.nan)
