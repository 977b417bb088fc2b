"""Neural collapse of features, measured from sums that add over batches and over ranks.

The measures live by subject in ``variability`` (NC1), ``means`` (NC2) and ``duality`` (NC0,
NC3 to NC5), the sums in ``class_sums``; what other trainings converge to is in ``geometry``.

Classes without samples are left out of everything, the ``1 / (K - 1)`` of the simplex included.
"""

from collections.abc import Callable, Collection
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import (
    ClassSums,
    GlobalMean,
    centered_class_means,
    class_means,
    class_variances,
    feature_mean,
    has_spread,
    to_float64,
)
from lightning_feat.functional.common.directions import FLOAT32_ROUNDING
from lightning_feat.functional.common.second_pass import CenterSums
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
    nc2_equinorm,
    nc2_etf_error,
    nc2_subspace_chordal_cv,
    nc2_subspace_spread,
    nc3_subspace_angle,
)
from lightning_feat.functional.neural_collapse.pairs import PairStatistics, pair_statistics
from lightning_feat.functional.neural_collapse.variability import (
    between_effective_rank,
    nc1_pinv_over_k,
    nc1_projected_over_k,
    nc1_projected_over_k_balanced,
    nc1_quotient,
    nc1_quotient_balanced,
    variability_collapse_index,
    vci_from_scatter,
)

# Every measure, and whether it grows as a network collapses.
GROWS_WITH_COLLAPSE = {
    "nc1_quotient": False,
    "nc1_quotient_balanced": False,
    "cdnv": False,
    "cdnv_worst_pair": False,
    "between_effective_rank": True,
    "nc2_equinorm": False,
    "nc2_cosine_std": False,
    "nc2_distance_mean": True,
    "nc2_distance_var": False,
    "nc2_log_distance_mean": False,
    "nc2_etf_error": False,
    "nc2_equiangularity": False,
    "nc1_pinv_over_k": False,
    "vci": False,
    "nc1_pinv_over_k_balanced": False,
    "ncc_accuracy": True,
    "nc4_mismatch": False,
    "nc0": False,
    "nc0_relative": False,
    "nc2_weight_equinorm": False,
    "nc2_weight_cosine_std": False,
    "nc3": False,
    "nc3_squared": False,
    "nc3_centered_weight": False,
    "nc3_cosine": True,
    "nc3_uniform_duality_var": False,
    "nc2_weight_etf_error": False,
    "nc2_weight_equiangularity": False,
    "nc3_duality_error": False,
    "bias_duality_classes": False,
    "bias_duality_samples": False,
    "nc2_subspace_chordal_cv": False,
    "nc2_subspace_spread": True,
    "nc3_subspace_angle": False,
}
# Which number of pairs of class means, or of classifier rows, a measure is made of.
_OF_MEAN_PAIRS = {
    "cdnv": "cdnv",
    "cdnv_worst_pair": "cdnv",
    "nc2_cosine_std": "cosine",
    "nc2_distance_mean": "chord",
    "nc2_distance_var": "chord",
    "nc2_log_distance_mean": "log_chord",
    "nc2_equiangularity": "off_simplex",
}
_OF_WEIGHT_PAIRS = {"nc2_weight_cosine_std": "cosine", "nc2_weight_equiangularity": "off_simplex"}


def collapse_measures(
    totals: ClassSums,
    *,
    moment: Tensor | None = None,
    residuals: CenterSums | None = None,
    scatter: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    basis: Tensor | None = None,
    global_mean: GlobalMean = "classes",
    rounding: float = FLOAT32_ROUNDING,
    measures: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Every measure that what is given allows, by a short name that stays the same.

    =====================  ==========================================================================================
    from the sums alone    ``nc1_quotient``, ``nc1_quotient_balanced``, ``cdnv``, ``cdnv_worst_pair``,
                           ``between_effective_rank``, ``nc2_equinorm``, ``nc2_cosine_std``, ``nc2_distance_mean``,
                           ``nc2_distance_var``, ``nc2_log_distance_mean``; unless ``D < C - 1``, where no simplex
                           fits, ``nc2_etf_error`` and ``nc2_equiangularity``
    with ``moment``        ``nc1_pinv_over_k``, ``vci``
    with ``residuals``     ``nc1_pinv_over_k`` (from these), ``nc1_pinv_over_k_balanced``, ``ncc_accuracy``; given
                           logits, ``nc4_mismatch``; the quotients and CDNV without their floor
    with ``scatter``       ``vci`` (from this)
    with ``weight``        ``nc0``, ``nc0_relative``, ``nc2_weight_equinorm``, ``nc2_weight_cosine_std``, ``nc3``,
                           ``nc3_squared``, ``nc3_centered_weight``, ``nc3_cosine``, ``nc3_uniform_duality_var``;
                           unless ``D < C - 1``, ``nc2_weight_etf_error``, ``nc2_weight_equiangularity`` and
                           ``nc3_duality_error``
    with ``bias`` as well  ``bias_duality_classes``, ``bias_duality_samples`` (by the global mean they use)
    with ``basis``         ``nc2_subspace_chordal_cv``, ``nc2_subspace_spread``, ``nc3_subspace_angle`` (degrees)
    =====================  ==========================================================================================

    How many samples they need, with n in a class. A class mean is off by the n-th part of the spread in its class, so
    a quotient q comes out as ``q (1 - 1/n) / (1 + q/n)`` and a CDNV v as ``v (1 - 1/n) / (1 + 2 v/n)``: they measure
    what lies well below n, and features without any class give n - 1 and (n - 1) / 2. NC1 by pseudo-inverse is made of
    such quotients of single directions, the largest of which decide: it grows with n until n is well above them. VCI v
    comes out as ``v (1 - D / (N - 1))`` at most: ten times as many samples as features leave a tenth. NC2 and NC3 take
    the means as they are: n well above the quotient. ``ncc_accuracy`` and ``nc4_mismatch`` need no more, but each
    sample is in its own mean, so that with few of a class they flatter. What cannot be known is nan: NC1, CDNV and VCI
    where no class has two samples, VCI where N samples span N - 1 directions.

    Args:
        totals: sums of the first pass.
        moment: ``(D, D)`` second moment of the same samples.
        residuals: sums of a second pass, whose centers were made with the same ``global_mean`` and ``rounding``.
        scatter: ``(D, D)`` within-class scatter of the second pass.
        weight: ``(C, D)`` rows of a linear classifier.
        bias: ``(C,)``; needs ``weight``.
        basis: ``(C, k, D)`` orthonormal rows of the class subspaces of a Grassmann classifier.
        global_mean: what class means are centred by, the mean of the class means or of all samples.
        rounding: relative rounding of the features, ``rounding_of`` the dtype they came in.
        measures: names of those to make; None makes all. The others cost nothing.

    Returns:
        Scalars, float64; nan where the data do not define a measure.

    Raises:
        ValueError: if a shape does not fit the sums, or a name is unknown.

    Cost: eigenvalues of a matrix of the smaller of C and D, a product of the class means with themselves, and memory
    for a few MB beyond the means; with ``moment`` or ``scatter`` eigenvectors of size D.
    """
    num_classes, width = totals.sums.shape
    _check_classifier(num_classes, width, weight, bias, basis)
    wanted = {*(GROWS_WITH_COLLAPSE if measures is None else measures)}
    if not wanted <= GROWS_WITH_COLLAPSE.keys():
        raise ValueError(f"measures={[*wanted - GROWS_WITH_COLLAPSE.keys()]}: choose from {[*GROWS_WITH_COLLAPSE]}")
    seen_C, simplex_fits = totals.counts > 0, width >= num_classes - 1
    mean_SD = centered_class_means(totals, global_mean)
    if not simplex_fits:
        wanted -= {"nc2_equiangularity", "nc2_weight_equiangularity"}
    variance_S = class_variances(totals, None if residuals is None else residuals.residual_squares)[seen_C]
    pairs = _Pairs(mean_SD, variance_S, {kind for name, kind in _OF_MEAN_PAIRS.items() if name in wanted})
    recipes: dict[str, Callable[[], Tensor]] = {
        "nc1_quotient": lambda: nc1_quotient(totals, global_mean, residuals),
        "nc1_quotient_balanced": lambda: nc1_quotient_balanced(totals, global_mean, residuals),
        "cdnv": lambda: torch.where(has_spread(totals), pairs["cdnv"].mean, torch.nan),
        "cdnv_worst_pair": lambda: torch.where(has_spread(totals), pairs["cdnv"].largest, torch.nan),
        "between_effective_rank": lambda: between_effective_rank(totals, global_mean, rounding),
        "nc2_equinorm": lambda: nc2_equinorm(mean_SD),
        "nc2_cosine_std": lambda: pairs["cosine"].std,
        "nc2_distance_mean": lambda: pairs["chord"].mean,
        "nc2_distance_var": lambda: pairs["chord"].variance,
        "nc2_log_distance_mean": lambda: -pairs["log_chord"].mean,
    }
    if simplex_fits:
        recipes["nc2_etf_error"] = lambda: nc2_etf_error(mean_SD)
        recipes["nc2_equiangularity"] = lambda: pairs["off_simplex"].mean
    if moment is not None:
        recipes["nc1_pinv_over_k"] = lambda: nc1_pinv_over_k(totals, moment, global_mean, rounding)
        recipes["vci"] = lambda: variability_collapse_index(totals, moment, global_mean, rounding)
    if scatter is not None:
        recipes["vci"] = lambda: vci_from_scatter(totals, scatter, global_mean, rounding)
    if residuals is not None:
        recipes["nc1_pinv_over_k"] = lambda: nc1_projected_over_k(totals, residuals)
        recipes["nc1_pinv_over_k_balanced"] = lambda: nc1_projected_over_k_balanced(totals, residuals)
        recipes["ncc_accuracy"] = lambda: ncc_accuracy(residuals)
        if not residuals.mismatches.isnan():
            recipes["nc4_mismatch"] = lambda: nc4_mismatch(residuals)
    if weight is not None:
        recipes |= _of_weight(to_float64(weight.detach()).to(mean_SD.device), seen_C, mean_SD, simplex_fits, wanted)
        if bias is not None:
            weight_SD = to_float64(weight.detach()).to(mean_SD.device)[seen_C]
            bias_S = to_float64(bias.detach()).to(mean_SD.device)[seen_C]
            for mean in ("classes", "samples"):
                recipes[f"bias_duality_{mean}"] = partial(_bias_duality, weight_SD, bias_S, totals, mean)
    if basis is not None:
        basis_SkD = to_float64(basis.detach()).to(mean_SD.device)[seen_C]
        recipes |= {
            "nc2_subspace_chordal_cv": lambda: nc2_subspace_chordal_cv(basis_SkD),
            "nc2_subspace_spread": lambda: nc2_subspace_spread(basis_SkD),
            "nc3_subspace_angle": lambda: nc3_subspace_angle(basis_SkD, class_means(totals)[seen_C]),
        }
    return {name: recipe() for name, recipe in recipes.items() if name in wanted}


def _bias_duality(weight_SD: Tensor, bias_S: Tensor, totals: ClassSums, global_mean: GlobalMean) -> Tensor:
    return bias_duality(weight_SD, bias_S, feature_mean(totals, global_mean))


def _of_weight(
    weight: Tensor, seen_C: Tensor, mean_SD: Tensor, simplex_fits: bool, wanted: Collection[str]
) -> dict[str, Callable[[], Tensor]]:
    weight_SD = weight[seen_C]
    pairs = _Pairs(weight_SD, None, {kind for name, kind in _OF_WEIGHT_PAIRS.items() if name in wanted})
    recipes: dict[str, Callable[[], Tensor]] = {
        "nc0": lambda: nc0(weight),
        "nc0_relative": lambda: nc0_relative(weight),
        "nc2_weight_equinorm": lambda: nc2_equinorm(weight_SD),
        "nc2_weight_cosine_std": lambda: pairs["cosine"].std,
        "nc3": lambda: nc3(weight_SD, mean_SD),
        "nc3_squared": lambda: nc3_squared(weight_SD, mean_SD),
        "nc3_centered_weight": lambda: nc3_centered_weight(weight_SD, mean_SD),
        "nc3_cosine": lambda: nc3_cosine(weight_SD, mean_SD),
        "nc3_uniform_duality_var": lambda: nc3_uniform_duality_var(weight_SD, mean_SD),
    }
    if simplex_fits:
        recipes |= {
            "nc2_weight_etf_error": lambda: nc2_etf_error(weight_SD),
            "nc2_weight_equiangularity": lambda: pairs["off_simplex"].mean,
            "nc3_duality_error": lambda: nc3_duality_error(weight_SD, mean_SD),
        }
    return recipes


class _Pairs:
    """What is asked of the pairs of some vectors, made in one sweep when the first is taken."""

    def __init__(self, vectors: Tensor, values: Tensor | None, kinds: Collection[str]) -> None:
        self._vectors, self._values, self._kinds = vectors, values, kinds

    @cached_property
    def _statistics(self) -> dict[str, PairStatistics]:
        return pair_statistics(self._vectors, self._kinds, self._values)

    def __getitem__(self, kind: str) -> PairStatistics:
        return self._statistics[kind]


def known_measures() -> list[str]:
    """The names of all measures that :func:`collapse_measures` can give."""
    return [*GROWS_WITH_COLLAPSE]


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
