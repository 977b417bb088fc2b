"""What fuzzing has found, one case each, so that it stays mended."""

import pytest
import torch

from lightning_feat.functional.common.class_sums import class_sums, second_moment
from lightning_feat.functional.common.directions import between_class_directions
from lightning_feat.functional.feature_shift import cosine_shift, relative_shift, relative_shift_by_sample
from lightning_feat.functional.grassmann import (
    orthonormality_error,
    principal_angles,
    random_basis,
    subspace_logits,
)
from lightning_feat.functional.neural_collapse.duality import neco_subspace
from lightning_feat.functional.neural_collapse.geometry import ce_nonnegative_collapse_count, free_features
from lightning_feat.functional.neural_collapse.losses import dot_regression, within_class_pull
from lightning_feat.functional.neural_collapse.means import (
    nc2_distance_mean,
    nc2_subspace_chordal_cv,
    nc2_subspace_spread,
)
from lightning_feat.functional.neural_collapse.mixup import mix_sums, plane_residual
from lightning_feat.functional.neural_collapse.regression import (
    explained_variance_ratio,
    nrc2,
    nrc3,
    nrc3_best_gamma,
    regression_optimum,
    two_neighbor_dimension,
)
from lightning_feat.functional.neural_collapse.simplex import directions
from lightning_feat.functional.neural_collapse.variability import cdnv_matrix, class_distance_normalized_variance
from lightning_feat.functional.simplicity_bias.clusters import slow_examples, two_means, useful_indices
from lightning_feat.functional.simplicity_bias.hard_examples import highest_losses
from lightning_feat.functional.transfer import few_shot_error_bound
from lightning_feat.functional.transfer.probe import fit_logistic_regression

NONE = torch.zeros(0, dtype=torch.long)
BYTES = torch.tensor([0, 1, 0, 1], dtype=torch.uint8)


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_features_of_no_width_span_no_directions():
    values, rows = between_class_directions(class_sums(torch.zeros(4, 0), BYTES.long(), 2))
    assert values.shape == (0,)
    assert rows.shape == (0, 0)


def test_directions_of_features_that_are_not_finite_are_nan():
    features = torch.full((3, 2), torch.nan)
    found = neco_subspace(class_sums(features, torch.tensor([0, 1, 1]), 2), second_moment(features), 1)
    assert found.directions.isnan().all()


def test_a_single_class_has_no_collapse_count():
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        ce_nonnegative_collapse_count(10, 1, 0.1, 0.1)


def test_free_features_of_no_samples_and_of_nan():
    assert free_features(normal(3, 2), torch.zeros(0, 3), 0.1).shape == (0, 2)
    with pytest.raises(ValueError, match="NaN or inf"):
        free_features(torch.full((3, 2), torch.nan), torch.full((1, 3), 1 / 3), 0.1)


def test_targets_in_bytes_are_indices_and_no_mask():
    features, means = normal(4, 3), normal(4, 3, seed=1)  # as many samples as classes: a mask would fit
    for loss in (dot_regression, within_class_pull):
        assert loss(features, BYTES, means) == loss(features, BYTES.long(), means)
    losses, per_class = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 1])
    assert highest_losses(losses, BYTES, per_class).tolist() == [False, False, True, True]
    arguments = features, features[:, :2], means[:2], BYTES, 1 - BYTES, torch.full((4,), 0.3)
    wide = *arguments[:3], *(entry.long() for entry in arguments[3:5]), arguments[5]
    torch.testing.assert_close(mix_sums(*arguments), mix_sums(*wide), equal_nan=True)


def test_twice_a_target_of_200_in_a_byte():
    targets = torch.full((4,), 200, dtype=torch.uint8)
    outputs = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    assert slow_examples(outputs, outputs[:, 0], targets, 201).slow.tolist() == [False, False, True, True]


def test_indices_of_no_examples_are_refused_clearly():
    with pytest.raises(ValueError, match="class indices below"):
        useful_indices(torch.zeros(0, 2), torch.zeros(0), NONE)


def test_subspaces_of_no_dimensions():
    basis = torch.zeros(3, 0, 0)
    assert nc2_subspace_chordal_cv(basis).isnan()
    assert nc2_subspace_spread(basis).isnan()
    assert orthonormality_error(basis).tolist() == [0, 0, 0]
    assert subspace_logits(torch.zeros(2, 0), basis).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_of_bases_in_half_precision(dtype):
    basis = random_basis(2, 2, 5, generator=torch.Generator().manual_seed(0))
    found = principal_angles(basis[0].to(dtype), basis[1])
    # A basis rounded to eps turns by no more than a few of them.
    torch.testing.assert_close(found, principal_angles(basis[0], basis[1]), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_whose_squares_do_not_fit_float32(scale):
    features, reference = normal(6, 4).float(), normal(6, 4, seed=1).float()
    basis = random_basis(3, 2, 4, generator=torch.Generator().manual_seed(0))
    measures = [relative_shift, relative_shift_by_sample, cosine_shift]
    calls = [lambda x, y, measure=measure: measure(x, y) for measure in measures]
    calls += [lambda x, y: subspace_logits(x, basis)] + [lambda x, y: directions(x)] * (scale > 1)
    for call in calls:
        # The scale is no power of two, so each entry is rounded once.
        torch.testing.assert_close(call(features * scale, reference * scale), call(features, reference))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_clusters_of_outputs_whose_squares_do_not_fit_float32(scale):
    outputs = torch.tensor([[0.0], [0.1], [5.0], [5.1], [7.0]])
    found, expected = (two_means(outputs * s, torch.zeros(5, dtype=torch.long), 1) for s in (scale, 1.0))
    assert found.cluster.equal(expected.cluster)
    torch.testing.assert_close(found.inertia / scale**2, expected.inertia, rtol=1e-5, atol=0)


def test_a_plane_of_short_vectors_is_a_plane():
    features, first, second = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    torch.testing.assert_close(
        plane_residual(features, first * 1e-30, second * 1e-30), plane_residual(features, first, second)
    )


def test_shift_of_no_samples_is_of_no_samples():
    assert relative_shift_by_sample(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3)).shape == (0,)


def test_prototypes_in_half_precision_have_lengths_in_float32():
    prototypes = normal(4, 3, seed=1).half()
    found = dot_regression(normal(4, 3).half(), BYTES, prototypes)
    torch.testing.assert_close(found, dot_regression(normal(4, 3).half().float(), BYTES, prototypes.float()))


@pytest.mark.parametrize("features", [torch.ones(4, 2), torch.zeros(4, 0)])
def test_a_probe_of_features_that_never_vary_knows_the_shares(features):
    fitted = fit_logistic_regression(features, torch.tensor([0, 0, 0, 1]), 2, 0.1)
    shares = (features.double() @ fitted.weight.T + fitted.bias)[0].softmax(0)
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_probe_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="NaN or inf"):
        fit_logistic_regression(torch.full((4, 2), torch.nan), BYTES.long(), 2, 0.1)


def test_regression_measures_of_what_is_not_finite_are_nan():
    nan_22, weight = torch.full((2, 2), torch.nan), normal(2, 3)
    assert nrc3(weight, nan_22, 0.0).isnan()
    assert nrc3_best_gamma(weight, nan_22).isnan()
    assert explained_variance_ratio(nan_22).isnan().all()
    assert nrc2(torch.zeros(4, 0), torch.zeros(2, 0)).isnan()
    with pytest.raises(ValueError, match="neither NaN nor inf"):
        regression_optimum(nan_22, 0.1, 0.1)


def test_no_gradient_is_a_crash_or_an_error():
    """The gradient of pdist of no rows ends the process in torch 2.15; those of filled diagonals were none or nan."""
    rows = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    nc2_distance_mean(rows).backward()
    class_distance_normalized_variance(class_sums(rows, NONE, 2)).backward()
    features = normal(6, 3).requires_grad_()
    totals = class_sums(features, torch.arange(6) % 3, 3)
    for value in (two_neighbor_dimension(features), few_shot_error_bound(totals), cdnv_matrix(totals)[0, 1]):
        (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
        assert gradient.isfinite().all()
