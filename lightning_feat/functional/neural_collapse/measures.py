"""Neural collapse of features, measured from sums that add over batches and over ranks.

The measures live by subject in ``variability`` (NC1), ``means`` (NC2) and ``duality`` (NC0,
NC3 to NC5), the sums in ``class_sums``; what other trainings converge to is in ``geometry``.

Classes without samples are left out of everything, the ``1 / (K - 1)`` of the simplex included.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import (
    CenterSums,
    ClassSums,
    GlobalMean,
    center_sums,
    centered_class_means,
    class_centers,
    class_means,
    class_sums,
    feature_mean,
    to_float64,
)
from lightning_feat.functional.neural_collapse.duality import (
    bias_duality,
    nc0,
    nc0_relative,
    nc3,
    nc3_centered_weight,
    nc3_cosine,
    nc3_duality_error,
    nc3_squared,
    nc3_uniform_duality_var,
    nc4_mismatch,
    ncc_accuracy,
)
from lightning_feat.functional.neural_collapse.means import (
    nc2_cosine_std,
    nc2_distance_mean,
    nc2_distance_var,
    nc2_equiangularity,
    nc2_equinorm,
    nc2_etf_error,
    nc2_log_distance_mean,
    nc2_subspace_chordal_cv,
    nc2_subspace_spread,
    nc3_subspace_angle,
)
from lightning_feat.functional.neural_collapse.variability import (
    between_effective_rank,
    cdnv_worst_pair,
    class_distance_normalized_variance,
    nc1_pinv_over_k,
    nc1_projected_over_k,
    nc1_projected_over_k_balanced,
    nc1_quotient,
    nc1_quotient_balanced,
    variability_collapse_index,
)


def collapse_measures(
    totals: ClassSums,
    *,
    moment: Tensor | None = None,
    residuals: CenterSums | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    basis: Tensor | None = None,
    global_mean: GlobalMean = "classes",
) -> dict[str, Tensor]:
    """Every measure that what is given allows, by a short name that stays the same.

    =====================  ==========================================================================================
    from the sums alone    ``nc1_quotient``, ``nc1_quotient_balanced``, ``cdnv``, ``cdnv_worst_pair``,
                           ``between_effective_rank``, ``nc2_equinorm``, ``nc2_cosine_std``, ``nc2_distance_mean``,
                           ``nc2_distance_var``, ``nc2_log_distance_mean``; unless ``D < C - 1``, where no simplex
                           fits, ``nc2_etf_error`` and ``nc2_equiangularity``
    with ``moment``        ``nc1_pinv_over_k``, ``vci``
    with ``residuals``     ``nc1_pinv_over_k`` (from these), ``nc1_pinv_over_k_balanced``, ``ncc_accuracy``; given
                           logits, ``nc4_mismatch``
    with ``weight``        ``nc0``, ``nc0_relative``, ``nc2_weight_equinorm``, ``nc2_weight_cosine_std``, ``nc3``,
                           ``nc3_squared``, ``nc3_centered_weight``, ``nc3_cosine``, ``nc3_uniform_duality_var``;
                           unless ``D < C - 1``, ``nc2_weight_etf_error``, ``nc2_weight_equiangularity`` and
                           ``nc3_duality_error``
    with ``bias`` as well  ``bias_duality_classes``, ``bias_duality_samples`` (by the global mean they use)
    with ``basis``         ``nc2_subspace_chordal_cv``, ``nc2_subspace_spread``, ``nc3_subspace_angle`` (degrees)
    =====================  ==========================================================================================

    Args:
        totals: sums of the first pass.
        moment: ``(D, D)`` second moment of the same samples.
        residuals: sums of a second pass, whose centers were made with the same ``global_mean``.
        weight: ``(C, D)`` rows of a linear classifier.
        bias: ``(C,)``; needs ``weight``.
        basis: ``(C, k, D)`` orthonormal rows of the class subspaces of a Grassmann classifier.
        global_mean: what class means are centred by, the mean of the class means or of all samples.

    Returns:
        Scalars, float64; nan where the data do not define a measure.

    Raises:
        ValueError: if a shape does not fit the sums.
    """
    num_classes, width = totals.sums.shape
    _check_classifier(num_classes, width, weight, bias, basis)
    seen_C, simplex_fits = totals.counts > 0, width >= num_classes - 1
    mean_SD = centered_class_means(totals, global_mean)
    values = {
        "nc1_quotient": nc1_quotient(totals, global_mean),
        "nc1_quotient_balanced": nc1_quotient_balanced(totals, global_mean),
        "cdnv": class_distance_normalized_variance(totals),
        "cdnv_worst_pair": cdnv_worst_pair(totals),
        "between_effective_rank": between_effective_rank(totals, global_mean),
        "nc2_equinorm": nc2_equinorm(mean_SD),
        "nc2_cosine_std": nc2_cosine_std(mean_SD),
        "nc2_distance_mean": nc2_distance_mean(mean_SD),
        "nc2_distance_var": nc2_distance_var(mean_SD),
        "nc2_log_distance_mean": nc2_log_distance_mean(mean_SD),
    }
    if simplex_fits:
        values |= {"nc2_etf_error": nc2_etf_error(mean_SD), "nc2_equiangularity": nc2_equiangularity(mean_SD)}
    if moment is not None:
        values["nc1_pinv_over_k"] = nc1_pinv_over_k(totals, moment, global_mean)
        values["vci"] = variability_collapse_index(totals, moment, global_mean)
    if residuals is not None:
        values["nc1_pinv_over_k"] = nc1_projected_over_k(totals, residuals)
        values["nc1_pinv_over_k_balanced"] = nc1_projected_over_k_balanced(totals, residuals)
        values["ncc_accuracy"] = ncc_accuracy(residuals)
        if not residuals.mismatches.isnan():
            values["nc4_mismatch"] = nc4_mismatch(residuals)
    if weight is not None:
        weight = to_float64(weight.detach()).to(mean_SD.device)
        weight_SD = weight[seen_C]
        values |= {
            "nc0": nc0(weight),
            "nc0_relative": nc0_relative(weight),
            "nc2_weight_equinorm": nc2_equinorm(weight_SD),
            "nc2_weight_cosine_std": nc2_cosine_std(weight_SD),
            "nc3": nc3(weight_SD, mean_SD),
            "nc3_squared": nc3_squared(weight_SD, mean_SD),
            "nc3_centered_weight": nc3_centered_weight(weight_SD, mean_SD),
            "nc3_cosine": nc3_cosine(weight_SD, mean_SD),
            "nc3_uniform_duality_var": nc3_uniform_duality_var(weight_SD, mean_SD),
        }
        if simplex_fits:
            values |= {
                "nc2_weight_etf_error": nc2_etf_error(weight_SD),
                "nc2_weight_equiangularity": nc2_equiangularity(weight_SD),
                "nc3_duality_error": nc3_duality_error(weight_SD, mean_SD),
            }
        if bias is not None:
            bias_S = to_float64(bias.detach()).to(mean_SD.device)[seen_C]
            values["bias_duality_classes"] = bias_duality(weight_SD, bias_S, feature_mean(totals, "classes"))
            values["bias_duality_samples"] = bias_duality(weight_SD, bias_S, feature_mean(totals, "samples"))
    if basis is not None:
        basis_SkD = to_float64(basis.detach()).to(mean_SD.device)[seen_C]
        values |= {
            "nc2_subspace_chordal_cv": nc2_subspace_chordal_cv(basis_SkD),
            "nc2_subspace_spread": nc2_subspace_spread(basis_SkD),
            "nc3_subspace_angle": nc3_subspace_angle(basis_SkD, class_means(totals)[seen_C]),
        }
    return values


def known_measures() -> list[str]:
    """The names of all measures that :func:`collapse_measures` can give."""
    totals = class_sums(torch.eye(3), torch.arange(3), 3)
    everything: dict[str, Any] = {
        "moment": torch.eye(3, dtype=torch.float64),
        "residuals": center_sums(torch.eye(3), torch.arange(3), torch.eye(3), class_centers(totals)),
        "weight": torch.eye(3),
        "bias": torch.zeros(3),
        "basis": torch.eye(3)[:, None],
    }
    return [*collapse_measures(totals, **everything)]


def _check_classifier(
    num_classes: int, width: int, weight: Tensor | None, bias: Tensor | None, basis: Tensor | None
) -> None:
    if weight is not None and weight.shape != (num_classes, width):
        raise ValueError(f"weight must be ({num_classes}, {width}), as the sums are, got {tuple(weight.shape)}")
    if bias is not None and weight is None:
        raise ValueError("a bias needs the weight it goes with: give both, or neither")
    if bias is not None and bias.shape != (num_classes,):
        raise ValueError(f"bias must be ({num_classes},), got {tuple(bias.shape)}")
    if basis is not None and (basis.ndim != 3 or basis.shape[::2] != (num_classes, width)):
        raise ValueError(f"basis must be ({num_classes}, subspace_dim, {width}), got {tuple(basis.shape)}")
