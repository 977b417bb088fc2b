"""Every public function of the functional room, one line each: how to call it in a world, and what must hold of it.

A function that is in no line fails a test. The least a new one needs is ``"file.name": Case(lambda w: (arguments,))``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import empty_class_sums
from lightning_feat.functional.common.directions import thin_svd
from lightning_feat.functional.common.looks import values_are_at_hand, without_looking
from lightning_feat.functional.common.precision import full_precision
from lightning_feat.functional.feature_shift import shift_sums
from lightning_feat.functional.neural_collapse.duality import neco_subspace
from lightning_feat.functional.neural_collapse.kept_features import kept_features_optimum
from lightning_feat.functional.neural_collapse.mixup import MixSums, mix_sums
from lightning_feat.functional.neural_collapse.pairs import pair_statistics
from lightning_feat.functional.simplicity_bias.blocks import crossed_counts
from lightning_feat.functional.simplicity_bias.forgetting import learning_times
from lightning_feat.functional.spectrum.moments import empty_moment_sums, moment_sums
from lightning_feat.functional.transfer.class_separation import direction_sums, pair_angle_sums
from tests.fuzz import definitions as slow
from tests.fuzz.worlds import FINITE, World


@dataclass(frozen=True)
class Case:
    """How one function is called, and what must hold.

    Args:
        arguments: of a world.
        keywords: of a world.
        degree: what a factor s on everything scaled does to the result: entry by entry, times s to this power.
        scales: exponents of two between which that holds.
        samples: what another order of the samples does: nothing, or the same to the rows of the result.
        adds: the results of two parts of the samples add up to that of all.
        gradient: with respect to every floating tensor that goes in, finite where the result is, and that of finite
            differences; False where a docstring says so or the result is a choice or a whole number.
        mutates: places of arguments that are meant to be overwritten.
        definition: the same computed slowly, of the same arguments in float64.
        step: of the finite differences.
        kinds: of worlds where the definition is compared: not those where it divides a rounding by a rounding.
        tolerance: of the comparisons, relative to the largest entry; in float64.
        exact: whether the dtypes of the arguments make no difference: everything is brought to float64 first.
        function: what is called, where it is not the function itself.
    """

    arguments: Callable[[World], tuple[Any, ...]]
    keywords: Callable[[World], dict[str, Any]] = lambda w: {}
    degree: float | Sequence[float] | None = None
    scales: tuple[int, int] = (-100, 100)
    samples: Literal["nothing", "along"] | None = None
    adds: bool = False
    gradient: bool = False
    step: float = 1e-5
    mutates: tuple[int, ...] = ()
    definition: Callable[..., Any] | None = None
    kinds: tuple[str, ...] = FINITE
    tolerance: float = 1e-9
    exact: bool = True
    function: Callable[..., Any] | None = None


F32 = partial(Case, exact=False)
cpu = torch.device("cpu")


def _features(w: World) -> tuple[Tensor, Tensor, int]:
    return w.features(), w.targets(), w.num_classes


def _totals(w: World) -> tuple[Any, ...]:
    return (w.totals(),)


def _with_moment(w: World) -> tuple[Any, ...]:
    return w.totals(), w.moment()


def _vectors(w: World) -> tuple[Tensor]:
    return (w.vectors(),)


def _moments(w: World) -> tuple[Any, ...]:
    return (moment_sums(w.features()),)


def _weight_and_means(w: World) -> tuple[Tensor, Tensor]:
    return w.vectors("weight"), w.vectors("means")


def _two_bases(w: World) -> tuple[Tensor, Tensor]:
    return w.basis("first"), w.basis("second")


def _shifted(w: World) -> tuple[Tensor, Tensor]:
    return w.features("now"), w.features("then")


def _per_block(w: World) -> tuple[Tensor, Tensor]:
    return w.lengths("text"), w.lengths("image")


def _grams(w: World) -> tuple[Tensor, ...]:
    return tuple(w.finish(0.5 + w.lengths(name).detach().double()) for name in ("a", "b", "c", "d"))


def _mixes(w: World) -> tuple[Tensor, ...]:
    shares = 0.1 + 0.8 * torch.rand(w.num_samples, generator=w.generator("shares"), dtype=torch.float64)
    return (
        w.features(),
        w.logits(),
        w.vectors("weight"),
        w.targets("first"),
        w.targets("second"),
        w.finish(w.per_sample(shares)),
    )


def _shares(w: World) -> Tensor:
    return w.finish(torch.linspace(0.1, 0.8, 4))


def _mix_totals(w: World) -> MixSums:
    return mix_sums(*_mixes(w))


def _neco(w: World) -> tuple[Any, ...]:
    return w.totals(), w.moment(), 1


def _probe(w: World) -> tuple[Tensor, ...]:
    return tuple(entry for name in "abc" for entry in (w.features(name), w.targets(name)))


def _tangent_step(w: World) -> tuple[Tensor, Tensor]:
    start = w.basis().detach()
    return start + 0.1 * w.matrices().detach().to(start), start


def _symmetric(w: World) -> Tensor:
    rows = replace(w, nudge=0.0, tape=[]).matrices().detach()
    rows = rows.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    return w.finish(rows @ rows.mT, rows.dtype)


def _decays(w: World) -> tuple[float, float]:
    return 10.0 ** -(2 + w.whole_number("weight decay", 3)), 10.0 ** -(2 + w.whole_number("feature decay", 3))


def _in_precision(device: torch.device) -> Tensor:
    with full_precision(device):
        return torch.ones(2) @ torch.ones(2)


def _unseen() -> bool:
    with without_looking():
        return values_are_at_hand(torch.ones(2))


def _block(w: World) -> Tensor:
    return torch.arange(w.num_features) < (w.num_features + 1) // 2


def _generator(w: World) -> dict[str, Any]:
    return {"generator": w.generator("draws")}


def _curve(w: World) -> tuple[Any, ...]:
    return [float(loss) for loss in w.losses()], 50


def _pairs(w: World) -> tuple[Tensor, Tensor]:
    vectors = w.finish(w.scale * w.raw("pairs", 4, w.num_features), torch.float64)
    return vectors, w.finish((w.scale * w.raw("values", 4)).square(), torch.float64)


CASES: dict[str, Case] = {
    "transfer.add_direction_sums_": Case(
        lambda w: (empty_class_sums(w.num_classes, w.num_features), *_features(w)[:2]), mutates=(0,), degree=0
    ),
    "transfer.direction_sums": Case(_features, degree=0, samples="nothing", adds=True, gradient=True),
    "transfer.class_separation_r2": Case(
        lambda w: (direction_sums(*_features(w)),), degree=0, samples="nothing", gradient=True
    ),
    "transfer.pair_angle_sums": Case(
        _features, degree=0, samples="nothing", gradient=True, definition=slow.pair_angle_sums, tolerance=1e-7
    ),
    "transfer.within_class_variability": Case(
        lambda w: (pair_angle_sums(*_features(w)),), degree=0, samples="nothing", gradient=True, tolerance=1e-7
    ),
    "transfer.sample_of_each_class": Case(lambda w: (w.targets(), 2)),
    "common.accumulation_device": Case(lambda w: (cpu,)),
    "common.to_float64": Case(lambda w: (w.features(),), degree=1, samples="along", gradient=True),
    "common.check_batch": Case(lambda w: (*_features(w), w.weights())),
    "common.check_target_range": Case(lambda w: (w.targets(), w.num_classes)),
    "common.check_values": Case(lambda w: (w.targets(), w.num_classes)),
    "common.looks_are_forbidden": Case(lambda w: ()),
    "common.values_are_at_hand": Case(lambda w: (w.features(),)),
    "common.without_looking": Case(lambda w: (), function=_unseen),
    "common.empty_class_sums": Case(lambda w: (w.num_classes, w.num_features)),
    "common.add_class_sums_": Case(
        lambda w: (empty_class_sums(w.num_classes, w.num_features), *_features(w)[:2], w.weights()),
        mutates=(0,),
        degree=(0, 1, 2),
    ),
    "common.class_sums": Case(
        _features, degree=(0, 1, 2), samples="nothing", adds=True, gradient=True, definition=slow.class_sums
    ),
    "common.second_moment": Case(
        lambda w: (w.features(), w.weights()), degree=2, samples="nothing", adds=True, gradient=True
    ),
    "common.class_means": Case(_totals, degree=1, samples="nothing", gradient=True, definition=slow.class_means),
    "common.present_class_means": Case(_totals, degree=1, samples="nothing", gradient=True),
    "common.class_variances": Case(_totals, degree=2, samples="nothing", gradient=True),
    "common.feature_mean": Case(_totals, degree=1, samples="nothing", gradient=True),
    "common.centered_class_means": Case(_totals, degree=1, samples="nothing", gradient=True),
    "common.has_spread": Case(_totals, samples="nothing"),
    "common.rounding_of": Case(lambda w: (w.dtype,)),
    "common.thin_svd": Case(  # the signs of directions are free
        lambda w: (w.finish(w.raw("matrix", 5, 3) * w.scale, torch.float64),),
        function=lambda matrix: thin_svd(matrix)[0],
        degree=1,
    ),
    "common.between_class_directions": Case(_totals, degree=(1, 0)),
    "common.class_centers": Case(_totals, degree=(1, 1, 0, -1)),
    "common.center_sums": Case(
        lambda w: (*_features(w)[:2], w.logits(), w.centers()), degree=(0, 0, 0, 0, 2), samples="nothing", adds=False
    ),
    "common.repeated_by_sampler": Case(lambda w: (2 * w.num_samples, 4, 1, 2, 3 * w.num_samples + 1)),
    "neural_collapse.nc0": Case(_vectors, degree=2, gradient=True),
    "neural_collapse.nc0_relative": Case(_vectors, degree=0, gradient=True),
    "neural_collapse.nc3": Case(_weight_and_means, degree=0, gradient=True, definition=slow.nc3),
    "neural_collapse.nc3_squared": Case(_weight_and_means, degree=0, gradient=True),
    "neural_collapse.nc3_centered_weight": Case(_weight_and_means, degree=0, gradient=True),
    "neural_collapse.nc3_cosine": Case(_weight_and_means, degree=0, gradient=True, definition=slow.nc3_cosine),
    "neural_collapse.nc3_duality_error": Case(_weight_and_means, degree=0, gradient=True),
    "neural_collapse.nc3_uniform_duality_var": Case(_weight_and_means, degree=4, gradient=True),
    "neural_collapse.bias_duality": Case(
        lambda w: (w.vectors("weight"), w.per_class(), w.finish(w.raw("mean", w.num_features))), gradient=True
    ),
    "neural_collapse.nc4_mismatch": Case(lambda w: (w.residuals(),), degree=0, samples="nothing"),
    "neural_collapse.ncc_accuracy": Case(lambda w: (w.residuals(),), degree=0, samples="nothing"),
    "neural_collapse.nc5_orthogonality": Case(
        lambda w: (w.totals(), w.finish(w.scale * w.raw("mean", w.num_features))), degree=0, gradient=True
    ),
    "neural_collapse.neco_subspace": Case(_neco, degree=(1, 1, 0)),
    "neural_collapse.neco_scores": Case(
        lambda w: (w.features("foreign"), neco_subspace(*_neco(w)), w.logits()), degree=0, samples="along"
    ),
    "neural_collapse.orthogonal_frame_error": Case(_vectors, degree=0, gradient=True),
    "neural_collapse.general_frame_error": Case(lambda w: (w.vectors(), w.lengths()), degree=0, gradient=True),
    "neural_collapse.mse_orthogonal_frame": Case(lambda w: (w.counts(), *_decays(w))),
    "neural_collapse.mse_collapse_count": Case(lambda w: (w.num_samples, *_decays(w))),
    "neural_collapse.ce_nonnegative_frame": Case(lambda w: (w.counts(), *_decays(w))),
    "neural_collapse.ce_nonnegative_collapse_count": Case(lambda w: (w.num_samples, w.num_classes, *_decays(w))),
    "neural_collapse.ce_frame": Case(lambda w: (w.counts(), 1e-2, 1e-2)),
    "neural_collapse.ce_merge_count": Case(lambda w: (w.num_samples, *_decays(w))),
    "neural_collapse.seli_vectors": Case(lambda w: (w.counts(),)),
    "neural_collapse.seli_grams": Case(lambda w: (w.counts(),)),
    "neural_collapse.minority_cosine": Case(
        lambda w: (w.vectors(), torch.arange(w.num_classes) < 2), degree=0, gradient=True
    ),
    "neural_collapse.free_features": Case(lambda w: (replace(w, scale=1).vectors(), w.soft_targets(), 1e-2, 20)),
    "neural_collapse.dot_regression": F32(
        lambda w: (w.features(), w.targets(), replace(w, scale=1).vectors()),
        degree=0,
        scales=(-20, 100),
        samples="nothing",
        gradient=True,
        definition=slow.dot_regression,
    ),
    "neural_collapse.balanced_lengths": F32(lambda w: (w.counts(),), definition=slow.balanced_lengths),
    "neural_collapse.within_class_pull": F32(
        lambda w: (w.features(), w.targets(), w.vectors("means")),
        degree=2,
        samples="nothing",
        gradient=True,
        definition=slow.within_class_pull,
    ),
    "neural_collapse.between_class_push": F32(_vectors, degree=0, scales=(-20, 100), gradient=True, tolerance=1e-6),
    "neural_collapse.cut_gradient": Case(lambda w: (w.features(),), degree=1, samples="along"),
    "neural_collapse.scale_gradient": F32(lambda w: (w.features(), 0.5), degree=1, samples="along"),
    "neural_collapse.cosine_matrix": Case(_vectors, degree=0, gradient=True, definition=slow.cosine_matrix),
    "neural_collapse.gram_error": Case(_weight_and_means, degree=0, gradient=True, definition=slow.nc3),
    "neural_collapse.simplex_gram": Case(lambda w: (w.num_classes,)),
    "neural_collapse.nc2_etf_error": Case(_vectors, degree=0, gradient=True, definition=slow.nc2_etf_error),
    "neural_collapse.nc2_equinorm": Case(_vectors, degree=0, gradient=True, definition=slow.nc2_equinorm),
    "neural_collapse.nc2_equiangularity": Case(_vectors, degree=0, gradient=True),
    "neural_collapse.nc2_cosine_std": Case(_vectors, degree=0, gradient=True),
    "neural_collapse.nc2_distance_mean": Case(_vectors, degree=0, gradient=True, definition=slow.nc2_distance_mean),
    "neural_collapse.nc2_distance_var": Case(_vectors, degree=0, gradient=True),
    "neural_collapse.nc2_log_distance_mean": Case(_vectors, degree=0, gradient=True),
    "neural_collapse.nc2_subspace_chordal_cv": Case(lambda w: (w.basis(),), tolerance=1e-6, gradient=True),
    "neural_collapse.nc2_subspace_spread": Case(lambda w: (w.basis(),), gradient=True, tolerance=1e-6),
    "neural_collapse.nc3_subspace_angle": Case(
        lambda w: (w.basis(), w.vectors("means")), gradient=True, tolerance=1e-6
    ),
    "neural_collapse.collapse_picture": Case(_totals, keywords=lambda w: {"within": w.covariance()}),
    "neural_collapse.within_class_covariance": Case(_with_moment, degree=2, samples="nothing", gradient=True),
    "neural_collapse.within_class_scatter": Case(
        lambda w: (*_features(w)[:2], replace(w, grad=False, nudge=0.0, order=None, part=None, tape=[]).centers()),
        degree=2,
        samples="nothing",
        adds=True,
        gradient=True,
    ),
    "neural_collapse.nc1_pinv": Case(_with_moment, degree=0, samples="nothing"),
    "neural_collapse.nc1_pinv_over_k": Case(_with_moment, degree=0, samples="nothing"),
    "neural_collapse.nc1_projected_over_k": Case(lambda w: (w.totals(), w.residuals()), degree=0, samples="nothing"),
    "neural_collapse.nc1_projected_over_k_balanced": Case(
        lambda w: (w.totals(), w.residuals()), degree=0, samples="nothing"
    ),
    "neural_collapse.nc1_quotient": Case(
        _totals, degree=0, samples="nothing", definition=slow.nc1_quotient, kinds=("normal",), gradient=True
    ),
    "neural_collapse.nc1_quotient_balanced": Case(_totals, degree=0, samples="nothing", gradient=True),
    "neural_collapse.cdnv_matrix": Case(_totals, degree=0, samples="nothing", gradient=True),
    "neural_collapse.class_distance_normalized_variance": Case(
        _totals, degree=0, samples="nothing", definition=slow.cdnv, kinds=("normal",), gradient=True
    ),
    "neural_collapse.cdnv_worst_pair": Case(_totals, degree=0, samples="nothing", gradient=True),
    "neural_collapse.variability_collapse_index": Case(_with_moment, degree=0, samples="nothing"),
    "neural_collapse.vci_from_scatter": Case(_with_moment, samples="nothing"),
    "neural_collapse.pair_statistics": Case(
        _pairs,
        function=lambda vectors, values: pair_statistics(vectors, ["chord", "cdnv"], values)["cdnv"].mean,
        degree=0,
        gradient=True,
    ),
    "neural_collapse.between_class_spectrum": Case(_totals, degree=2, samples="nothing"),
    "neural_collapse.within_class_spectrum": Case(_with_moment, degree=2, samples="nothing"),
    "neural_collapse.covariance_spectrum": Case(lambda w: (w.covariance(),), degree=2, samples="nothing"),
    "neural_collapse.between_effective_rank": Case(_totals, degree=0, samples="nothing", gradient=True),
    "feature_shift.relative_shift": F32(
        lambda w: (*_shifted(w), w.mask()),
        degree=0,
        samples="nothing",
        gradient=True,
        definition=slow.relative_shift,
    ),
    "feature_shift.relative_shift_by_sample": F32(_shifted, degree=0, samples="along", gradient=True),
    "feature_shift.shift_sums": F32(
        lambda w: (*_shifted(w), w.mask()), degree=(0, 1, 1, 0), samples="nothing", adds=True
    ),
    "feature_shift.shift_measures": F32(lambda w: (shift_sums(*_shifted(w)),), degree=0, samples="nothing"),
    "feature_shift.cosine_shift": F32(
        _shifted, degree=0, samples="nothing", gradient=True, definition=slow.cosine_shift, kinds=("normal", "doubled")
    ),
    "feature_shift.feature_distillation": F32(_shifted, degree=2, samples="nothing", gradient=True),
    "feature_shift.l2_sp": F32(lambda w: ([w.features(), w.vectors()], [w.features("start"), None]), degree=2),
    "feature_shift.shift_discrepancy": F32(_per_block, degree=1),
    "feature_shift.shift_consistency_loss": F32(_per_block, degree=2, gradient=True),
    "grassmann.subspace_logits": F32(
        lambda w: (w.features(), w.basis()),
        degree=0,
        samples="along",
        gradient=True,
        definition=slow.subspace_logits,
    ),
    "grassmann.principal_angles": F32(_two_bases, definition=slow.principal_angles, tolerance=1e-6),
    "grassmann.svdvals_or_nan": F32(lambda w: (w.matrices(),), degree=1),
    "grassmann.geodesic_distance": F32(_two_bases, gradient=True),
    "grassmann.chordal_distance": F32(_two_bases, definition=slow.chordal_distance, tolerance=1e-6, gradient=True),
    "grassmann.orthonormality_error": F32(lambda w: (w.matrices(),)),
    "grassmann.polar_projection": F32(lambda w: (w.matrices(),), degree=0),
    "grassmann.random_basis": Case(lambda w: (w.num_classes, 1, max(w.num_features, 1)), _generator),
    "grassmann.tangent_projection": F32(lambda w: (w.basis(), w.basis("vector")), gradient=True),
    "grassmann.pairwise_principal_angles": F32(lambda w: (w.basis(),), tolerance=1e-6),
    "common.full_precision": Case(lambda w: (cpu,), function=_in_precision),
    "grassmann.geodesic_": F32(_tangent_step, mutates=(0,)),
    "grassmann.cos_and_sinc": F32(lambda w: (_symmetric(w),), gradient=True),
    "simplicity_bias.highest_losses": Case(lambda w: (w.losses(), w.targets(), w.counts() // 16)),
    "simplicity_bias.random_examples": Case(lambda w: (w.targets(), w.counts() // 16)),
    "simplicity_bias.misclassified": Case(lambda w: (w.logits(), w.targets()), samples="along"),
    "common.length": F32(lambda w: (w.features(),), degree=1, samples="along", gradient=True, definition=slow.length),
    "common.tamed": F32(lambda w: (w.features(),)),
    "transfer.linear_probe": Case(_probe, lambda w: {"penalties": [0.1, 1.0]}),
    "transfer.fit_logistic_regression": Case(lambda w: (*_features(w), 0.1), tolerance=1e-4),
    "transfer.hold_out": Case(lambda w: (w.targets(), 0.3)),
    "neural_collapse.free_logits": Case(
        lambda w: (w.finish(w.soft_targets().detach(), torch.float64), 10.0), samples="along"
    ),
    "neural_collapse.free_strength": Case(lambda w: (w.num_classes, 1.5, 1e-3)),
    "neural_collapse.free_mixed_features": Case(
        lambda w: (
            torch.eye(max(w.num_classes, 2))[: w.num_samples].double(),
            replace(w, num_features=9, scale=1.0).simplex(),
            1e-2,
        )
    ),
    "neural_collapse.strength_of_margin": Case(lambda w: (w.scores(), w.num_classes)),
    "neural_collapse.free_slope": Case(
        lambda w: (w.finish(w.raw("margin", 1)[0].abs() + 1), _shares(w), w.num_classes), tolerance=1e-8
    ),
    "neural_collapse.mix_sums": Case(_mixes, degree=(0, 0, 0, 0, 0), samples="nothing", adds=True),
    "neural_collapse.draw_pairs": Case(lambda w: (w.targets(), 3), _generator),
    "neural_collapse.plane_residual": Case(
        lambda w: (w.features(), w.features("first"), w.features("second")),
        degree=0,
        samples="along",
        gradient=True,
        definition=slow.plane_residual,
        kinds=("normal",),
        tolerance=1e-6,
    ),
    "neural_collapse.mix_measures": Case(
        lambda w: (_mix_totals(w), _shares(w), w.num_classes), samples="nothing", tolerance=1e-8
    ),
    "neural_collapse.collapse_measures": Case(
        _totals,
        lambda w: {
            "moment": w.moment(),
            "residuals": w.residuals(),
            "weight": replace(w, scale=1).vectors(),
            "bias": w.per_class(),
            "basis": w.basis(),
        },
        samples="nothing",
        tolerance=1e-6,
    ),
    "neural_collapse.known_measures": Case(lambda w: ()),
    "feature_shift.gram_norm": F32(lambda w: (w.matrices(),), degree=2, gradient=True, step=1e-3),
    "feature_shift.gram_ratio": F32(lambda w: _grams(w)[:2]),
    "feature_shift.gram_discrepancy": F32(_grams),
    "feature_shift.gram_consistency_loss": F32(_grams),
    "feature_shift.exact_dtype": Case(lambda w: (cpu,)),
    "neural_collapse.target_covariance": Case(
        lambda w: (w.outputs(),), degree=2, samples="nothing", gradient=True, definition=slow.target_covariance
    ),
    "neural_collapse.nrc1": Case(lambda w: (w.features(), 1), degree=0, samples="nothing"),
    "neural_collapse.nrc2": Case(lambda w: (w.features(), w.vectors()), degree=0, samples="nothing"),
    "neural_collapse.nrc3": Case(lambda w: (w.vectors(), w.covariance(), 0.0), degree=0),
    "neural_collapse.nrc3_best_gamma": Case(lambda w: (w.vectors(), w.covariance())),
    "neural_collapse.nrc3_gamma_from_traces": Case(lambda w: (w.vectors(), w.covariance())),
    "neural_collapse.kept_features_optimum": Case(
        lambda w: (w.features(), w.targets(), 0.1, 0.01, 0.1),
        function=lambda *arguments: kept_features_optimum(*arguments)[:3],  # the last is rounding
        tolerance=1e-7,  # of L-BFGS
    ),
    "neural_collapse.realigned_lengths": Case(
        lambda w: (w.vectors(),), degree=0, scales=(-20, 20), definition=slow.realigned_lengths
    ),
    "neural_collapse.prior_shift": Case(
        lambda w: (torch.arange(1.0, w.num_classes + 1), torch.ones(w.num_classes)), definition=slow.prior_shift
    ),
    "neural_collapse.regression_optimum": Case(lambda w: (w.outputs(), *_decays(w))),
    "neural_collapse.explained_variance_ratio": Case(lambda w: (w.features(), 3), degree=0, samples="nothing"),
    "neural_collapse.two_neighbor_dimension": Case(
        lambda w: (w.features(),), degree=0, samples="nothing", gradient=True, definition=slow.two_neighbor_dimension
    ),
    "simplicity_bias.sharpness_step": F32(lambda w: ([w.features(), w.vectors()],), degree=0),
    "simplicity_bias.adaptive_scales": F32(lambda w: ([w.features(), w.vectors()],)),
    "simplicity_bias.accuracy": Case(lambda w: (w.logits(), w.targets()), samples="nothing"),
    "simplicity_bias.binary_auc": Case(
        lambda w: (w.scores(), w.targets() % 2), degree=0, samples="nothing", definition=slow.binary_auc
    ),
    "simplicity_bias.permuted_block": F32(
        lambda w: (w.features(), _block(w), torch.arange(w.num_samples).flip(0)), degree=1
    ),
    "simplicity_bias.block_randomized": Case(
        lambda w: (lambda x: x, w.logits(), w.targets(), torch.arange(w.num_classes) < 1)
    ),
    "simplicity_bias.feature_reliance": Case(
        lambda w: (w.targets("a"), w.targets("b"), w.num_classes), samples="nothing"
    ),
    "simplicity_bias.shortcut_bias": Case(lambda w: (w.targets("a"), w.targets("b"), w.targets("c"), w.num_classes)),
    "simplicity_bias.slow_feature_accuracy": Case(lambda w: (w.targets("a"), w.targets(), w.mask()), samples="nothing"),
    "simplicity_bias.selection_quality": Case(lambda w: (w.mask("a"), w.mask("b")), samples="nothing"),
    "simplicity_bias.separating_epoch": Case(_curve),
    "simplicity_bias.knee_reached": Case(_curve),
    "common.check_shapes": Case(lambda w: (), lambda w: {"features": (w.features(), "ND")}),
    "neural_collapse.simplex_prototypes": Case(lambda w: (w.num_classes, w.num_features)),
    "neural_collapse.sparse_simplex_prototypes": Case(lambda w: (w.num_classes, w.num_features, 0.1)),
    "neural_collapse.prototype_cosines": F32(
        lambda w: (w.features(), replace(w, scale=1).vectors()),
        degree=0,
        scales=(-20, 100),
        samples="along",
        gradient=True,
    ),
    "neural_collapse.directions": F32(
        lambda w: (w.features(),), degree=0, scales=(-20, 100), samples="along", gradient=True
    ),
    "simplicity_bias.gaussian_clones": F32(_features, degree=1),
    "simplicity_bias.ledoit_wolf_shrinkage": Case(lambda w: (w.features(),), degree=0, samples="nothing"),
    "simplicity_bias.linear_discriminant": Case(_features, degree=(-1, 0), samples="nothing", tolerance=1e-6),
    "simplicity_bias.next_log_step": Case(lambda w: (w.num_samples, w.num_classes)),
    "simplicity_bias.top_eigenvalue": Case(
        lambda w: (lambda v: 2 * v, torch.ones(w.num_features, dtype=torch.float64))
    ),
    "simplicity_bias.learning_times": Case(lambda w: (torch.stack([w.mask("a"), w.mask("b"), w.mask("c")]),)),
    "simplicity_bias.no_looks": Case(lambda w: (w.num_samples,)),
    "simplicity_bias.with_look": Case(
        lambda w: (learning_times(torch.stack([w.mask("a"), w.mask("b")])), w.mask("c"), 3, w.mask("d"))
    ),
    "simplicity_bias.block_mask": Case(lambda w: (_block(w), (w.num_features,))),
    "simplicity_bias.crossed_counts": Case(
        lambda w: (w.targets("a"), w.targets("b"), w.num_classes), samples="nothing", adds=True
    ),
    "simplicity_bias.reliance_of_counts": Case(
        lambda w: (crossed_counts(w.targets("a"), w.targets("b"), w.num_classes),), samples="nothing"
    ),
    "simplicity_bias.two_means": F32(_features, degree=(0, 2), tolerance=1e-6),
    "simplicity_bias.slow_examples": F32(
        lambda w: (w.features(), w.losses(), w.targets(), w.num_classes), degree=0, tolerance=1e-6
    ),
    "simplicity_bias.useful_indices": F32(lambda w: (w.features(), w.losses(), w.targets()), degree=0),
    "transfer.few_shot_error": Case(lambda w: (*_features(w)[:2], 1, 3), _generator, degree=0),
    "common.effective_rank": Case(lambda w: (w.weights(),), degree=0, gradient=True),
    "common.lots": Case(lambda w: (torch.arange(w.num_samples), w.seed)),
    "common.lowest_lots": Case(lambda w: (torch.arange(w.num_samples), 3, w.seed)),
    "spectrum.empty_moment_sums": Case(lambda w: (w.num_features,)),
    "spectrum.moment_sums": Case(
        lambda w: (w.features(),), degree=(0, 1, 2), samples="nothing", adds=True, gradient=True
    ),
    "spectrum.add_moment_sums_": Case(
        lambda w: (empty_moment_sums(w.num_features), w.features(), w.weights()), degree=(0, 1, 2), mutates=(0,)
    ),
    "spectrum.covariance": Case(_moments, degree=2, samples="nothing"),
    "spectrum.covariance_spectrum": Case(_moments, degree=2, samples="nothing", tolerance=1e-6),
    "spectrum.rankme": Case(lambda w: (w.features(),), degree=0, samples="nothing", gradient=True, tolerance=1e-6),
    "spectrum.lidar": Case(lambda w: _features(w)[:2], samples="nothing", tolerance=1e-6),
    "spectrum.spectral_decay": Case(
        lambda w: (w.weights().sort(descending=True).values,), degree=(0, 0), tolerance=1e-6
    ),
    "spectrum.wasserstein_uniformity": F32(lambda w: (w.features(),), degree=0, samples="nothing", tolerance=1e-6),
    "spectrum.wasserstein_uniformity_of_sums": Case(
        lambda w: (moment_sums(torch.nn.functional.normalize(w.features().double(), dim=1)),), samples="nothing"
    ),
    "spectrum.gaussian_uniformity": F32(lambda w: (w.features(),), degree=0, samples="nothing", gradient=True),
    "spectrum.alignment": F32(_shifted, degree=0, samples="nothing", gradient=True),
    "spectrum.tolerance": Case(
        lambda w: (direction_sums(w.features(), w.targets(), w.num_classes),), samples="nothing"
    ),
    "spectrum.koleo": F32(lambda w: (w.features(),), degree=0, samples="nothing"),
    "spectrum.hyperspherical_energy": Case(lambda w: (w.features(),), degree=0, samples="nothing", tolerance=1e-6),
    "spectrum.channel_energy": Case(_moments, degree=0, samples="nothing", tolerance=1e-6),
    "transfer.nearest_neighbours": F32(lambda w: (w.features(), 3), degree=0),
    "transfer.neighbour_votes": F32(
        lambda w: (*_features(w)[:2], w.features("queries"), w.num_classes, 3), degree=0, tolerance=1e-6
    ),
    "transfer.nearest_mean_scores": F32(lambda w: (w.features(), w.vectors("means")), samples="along", gradient=True),
    "transfer.calibrated_prototypes": F32(
        lambda w: (w.vectors("few"), w.vectors("many")), degree=0, gradient=True, tolerance=1e-6
    ),
    "transfer.neighbour_accuracy": Case(
        lambda w: (torch.arange(w.num_samples)[:, None], w.targets()), samples="nothing"
    ),
    "common.principal_coordinates": Case(lambda w: (w.features(),)),
    "common.similarity_order": Case(lambda w: (torch.eye(w.num_classes),)),
    "transfer.few_shot_error_bound": Case(lambda w: (w.totals(), 5), degree=0, samples="nothing", gradient=True),
}

# What may be done to an argument, by its place, so that it is still right: see ``spoiled`` in test_functional.py.
_VECTORS, _CLASSES, _COUNTS, _ROWS = {"deep", "flat"}, {"beyond", "below"}, {"beyond", "broken"}, {"short"}
STILL_FIT: dict[str, dict[int, set[str]]] = {
    "common.effective_rank": {0: {"deep"}},
    "common.lots": {0: {"below", "beyond", "short"}},
    "common.lowest_lots": {0: {"below", "beyond", "short"}},
    "spectrum.lidar": {1: {"beyond"}},
    "transfer.calibrated_prototypes": {0: _ROWS, 1: _ROWS},
    "transfer.nearest_mean_scores": {0: _ROWS, 1: _ROWS},
    "transfer.neighbour_votes": {2: _ROWS},
    "transfer.neighbour_accuracy": {1: _CLASSES},
    "transfer.sample_of_each_class": {0: _CLASSES},
    "common.check_target_range": {0: {"deep", "scalar", "broken"}},
    "common.check_values": {0: {"deep", "flat", "scalar", "broken"}},
    "common.values_are_at_hand": {0: {"deep", "flat", "scalar"}},
    "common.to_float64": {0: _VECTORS | {"scalar"}},
    "neural_collapse.ce_frame": {0: _COUNTS},
    "neural_collapse.ce_nonnegative_frame": {0: _COUNTS},
    "neural_collapse.free_features": {1: _ROWS},
    "neural_collapse.mse_orthogonal_frame": {0: _COUNTS},
    "neural_collapse.seli_vectors": {0: _COUNTS},
    "neural_collapse.seli_grams": {0: _COUNTS},
    "neural_collapse.balanced_lengths": {0: _COUNTS | {"below"}},
    "neural_collapse.cut_gradient": {0: _VECTORS | {"scalar"}},
    "neural_collapse.scale_gradient": {0: _VECTORS | {"scalar"}},
    "grassmann.chordal_distance": {0: _ROWS, 1: _ROWS},  # one of them is held against all
    "grassmann.geodesic_distance": {0: _ROWS, 1: _ROWS},
    "grassmann.orthonormality_error": {0: {"deep"}},
    "grassmann.principal_angles": {0: _ROWS, 1: _ROWS},
    "grassmann.tangent_projection": {0: _ROWS, 1: _ROWS},
    "grassmann.subspace_logits": {0: _ROWS, 1: _ROWS},
    "grassmann.svdvals_or_nan": {0: {"deep"}},
    "simplicity_bias.highest_losses": {2: {"beyond"}},
    "simplicity_bias.block_mask": {0: _ROWS},
    "simplicity_bias.top_eigenvalue": {1: _ROWS},
    "simplicity_bias.reliance_of_counts": {0: {"beyond"}},
    "simplicity_bias.random_examples": {0: _ROWS, 1: {"beyond"}},
    "common.length": {0: _VECTORS},
    "common.tamed": {0: _VECTORS},
    "transfer.hold_out": {0: _CLASSES},
    "transfer.linear_probe": {1: _CLASSES, 3: _CLASSES, 5: _CLASSES},
    "neural_collapse.draw_pairs": {0: _CLASSES},
    "neural_collapse.free_mixed_features": {0: _ROWS},
    "neural_collapse.free_slope": {1: _ROWS},
    "neural_collapse.strength_of_margin": {0: {"deep", "scalar"}},
    "feature_shift.gram_norm": {0: {"deep"}},
    "neural_collapse.nrc2": {0: _ROWS, 1: _ROWS},
    "simplicity_bias.block_randomized": {3: {"scalar", "short"}},
    "simplicity_bias.permuted_block": {1: {"scalar", "short"}},
    "simplicity_bias.slow_feature_accuracy": {0: _CLASSES, 1: _CLASSES},
    "neural_collapse.directions": {0: _VECTORS},
    "neural_collapse.prototype_cosines": {0: _ROWS, 1: _ROWS},
    "simplicity_bias.useful_indices": {2: {"beyond"}},
    "transfer.few_shot_error": {1: _CLASSES},
    "neural_collapse.kept_features_optimum": {1: {"beyond"}},
}
