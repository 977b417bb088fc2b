"""Values known from algebra, symmetries, and what is undefined."""

import math

import pytest
import torch

from lightning_feat.functional import neural_collapse as nc

C, D, RADIUS, SPREAD = 5, 7, 3.0, 0.2  # means of norm RADIUS on a simplex, covariance SPREAD^2 I in every class


def simplex_means(num_classes=C, width=D, radius=RADIUS):
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(width, num_classes, generator=generator, dtype=torch.float64))[0]
    simplex = math.sqrt(num_classes / (num_classes - 1)) * nc.simplex_gram(num_classes)
    return radius * simplex @ basis.T


@pytest.fixture(scope="module")
def isotropic():
    """Features of covariance SPREAD^2 I in every class: the points +-sqrt(D) SPREAD e_d around its mean."""
    points = math.sqrt(D) * SPREAD * torch.cat([torch.eye(D), -torch.eye(D)]).double()
    features = (simplex_means()[:, None] + points).reshape(-1, D)
    return features + 0.5, torch.arange(C).repeat_interleave(2 * D)  # the global mean is not at the origin


def random_problem(seed=0, sizes=(40, 25, 9, 4), width=6, offset=1.0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    means = 2 * torch.randn(len(sizes), width, generator=generator, dtype=torch.float64) + offset
    noise = torch.randn(len(targets), width, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(sizes), width, generator=generator, dtype=torch.float64)
    return means[targets] + noise, targets, weight, torch.randn(len(sizes), generator=generator, dtype=torch.float64)


def measure(features, targets, weight=None, bias=None, logits=None, num_classes=None, global_mean="classes"):
    num_classes = num_classes or int(targets.max()) + 1
    sums = nc.class_sums(features, targets, num_classes)
    residuals = nc.center_sums(features, targets, logits, nc.class_centers(sums, global_mean))
    moment = nc.second_moment(features)
    values = nc.collapse_measures(
        sums, moment=moment, residuals=residuals, weight=weight, bias=bias, global_mean=global_mean
    )
    return {**values, "nc1_from_moment": nc.nc1_pinv_over_k(sums, moment, global_mean)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nc1_pinv_over_k", SPREAD**2 * (C - 1) ** 2 / RADIUS**2 / C),
        ("nc1_from_moment", SPREAD**2 * (C - 1) ** 2 / RADIUS**2 / C),
        ("nc1_pinv_over_k_balanced", SPREAD**2 * (C - 1) ** 2 / RADIUS**2 / C),
        ("nc1_quotient", D * SPREAD**2 / RADIUS**2),
        ("nc1_quotient_balanced", D * SPREAD**2 / RADIUS**2),
        ("cdnv", D * SPREAD**2 * (C - 1) / (2 * C * RADIUS**2)),
        ("cdnv_worst_pair", D * SPREAD**2 * (C - 1) / (2 * C * RADIUS**2)),
        ("vci", SPREAD**2 / (SPREAD**2 + RADIUS**2 / (C - 1))),
        ("between_effective_rank", C - 1),
        ("nc2_etf_error", 0),
        ("nc2_equinorm", 0),
        ("nc2_equiangularity", 0),
        ("nc2_cosine_std", 0),
        ("nc2_distance_mean", math.sqrt(2 * C / (C - 1))),
        ("nc2_distance_var", 0),
        ("nc2_log_distance_mean", -math.log(2 * C / (C - 1)) / 2),
        ("nc0", 0),
        ("nc2_weight_etf_error", 0),
        ("nc3", 0),
        ("nc3_squared", 0),
        ("nc3_cosine", 1),
        ("nc3_duality_error", 0),
        ("nc3_uniform_duality_var", 0),
        ("ncc_accuracy", 1),
    ],
)
def test_simplex_means_with_equal_spread(isotropic, name, expected):
    value = measure(*isotropic, weight=4 * simplex_means())[name]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_pseudo_inverse_is_the_definition_with_sample_mean_too():
    features, targets, *_ = random_problem()
    for global_mean in ("classes", "samples"):
        means = torch.stack([features[targets == c].mean(0) for c in range(4)])
        center = means.mean(0) if global_mean == "classes" else features.mean(0)
        within = (features - means[targets]).T @ (features - means[targets]) / len(features)
        between = (means - center).T @ (means - center) / 4
        expected = torch.trace(within @ torch.linalg.pinv(between, rtol=1e-9, hermitian=True)) / 4
        values = measure(features, targets, global_mean=global_mean)
        torch.testing.assert_close(values["nc1_from_moment"], expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(values["nc1_pinv_over_k"], expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(values["nc1_quotient"], within.trace() / between.trace(), rtol=1e-10, atol=0)


def test_balanced_forms_average_the_covariances_of_classes():
    features, targets, *_ = random_problem()
    means = torch.stack([features[targets == c].mean(0) for c in range(4)])
    covariances = torch.stack([torch.cov(features[targets == c].T, correction=0) for c in range(4)])
    between = torch.cov(means.T, correction=0)
    inverse = torch.linalg.pinv(between, rtol=1e-9, hermitian=True)
    values = measure(features, targets)
    expected = torch.trace(covariances.mean(0) @ inverse) / 4
    torch.testing.assert_close(values["nc1_pinv_over_k_balanced"], expected, rtol=1e-10, atol=0)
    expected = covariances.mean(0).trace() / between.trace()
    torch.testing.assert_close(values["nc1_quotient_balanced"], expected, rtol=1e-10, atol=0)


def test_cdnv_is_the_mean_over_pairs_one_sided_or_two_sided():
    features, targets, *_ = random_problem()
    sums, parts = nc.class_sums(features, targets, 4), [features[targets == c] for c in range(4)]
    variance = [(part - part.mean(0)).square().sum(1).mean() for part in parts]
    one_sided = torch.full((4, 4), torch.nan, dtype=torch.float64)
    for i in range(4):
        for j in set(range(4)) - {i}:
            one_sided[i, j] = variance[i] / (parts[i].mean(0) - parts[j].mean(0)).square().sum()
    torch.testing.assert_close(nc.cdnv_matrix(sums), one_sided, equal_nan=True)
    two_sided = (one_sided + one_sided.T) / 2
    torch.testing.assert_close(nc.class_distance_normalized_variance(sums), two_sided.nanmean())
    torch.testing.assert_close(nc.class_distance_normalized_variance(sums), one_sided.nanmean())
    torch.testing.assert_close(nc.cdnv_worst_pair(sums), two_sided[~two_sided.isnan()].max())


def test_figures_of_vectors_are_their_definitions():
    vectors = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()
    pairs = [(i, j) for i in range(5) for j in range(i)]
    cosines = torch.stack([torch.cosine_similarity(vectors[i], vectors[j], dim=0) for i, j in pairs])
    norms = torch.tensor([float(v.norm()) for v in vectors]).double()
    torch.testing.assert_close(nc.nc2_equiangularity(vectors), (cosines + 1 / 4).abs().mean())
    torch.testing.assert_close(nc.nc2_cosine_std(vectors), cosines.std(correction=0))
    torch.testing.assert_close(nc.nc2_equinorm(vectors), norms.std(correction=1) / norms.mean())
    torch.testing.assert_close(nc.nc2_log_distance_mean(vectors), -(2 - 2 * cosines).sqrt().log().mean())


def test_duality_is_its_definition():
    features, targets, weight, _ = random_problem()
    means = nc.centered_class_means(nc.class_sums(features, targets, 4))
    values = measure(features, targets, weight=weight)
    centered = weight - weight.mean(0)
    torch.testing.assert_close(values["nc3"], (weight / weight.norm() - means / means.norm()).norm())
    torch.testing.assert_close(values["nc3_squared"], values["nc3"].square())
    expected = (centered / centered.norm() - means / means.norm()).norm()
    torch.testing.assert_close(values["nc3_centered_weight"], expected)
    torch.testing.assert_close(values["nc0"], weight.sum(0).square().sum())
    torch.testing.assert_close(values["nc0_relative"], weight.sum(0).square().sum() / (4 * weight.square().sum()))


@pytest.mark.parametrize("shift", [0.0, 1e6])  # far from the origin distances in the plain form would cancel
def test_decisions_are_compared_with_the_nearest_class_mean(shift):
    features, targets, weight, bias = random_problem()
    logits, features = features @ weight.T + bias, features + shift
    means = torch.stack([features[targets == c].mean(0) for c in range(4)])
    nearest = torch.stack([(h - means).norm(dim=1).argmin() for h in features])
    values = measure(features, targets, logits=logits)
    assert values["nc4_mismatch"] == (logits.argmax(1) != nearest).double().mean()
    assert values["ncc_accuracy"] == (nearest == targets).double().mean()
    assert 0 < values["nc4_mismatch"] < 1
    assert 0.5 < values["ncc_accuracy"] < 1


ROTATION = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
LINEAR = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # condition number 16
WITH_UNITS = {"nc0", "nc3_uniform_duality_var", "bias_duality_classes", "bias_duality_samples"}


def compare(names, first, second):
    for name in names:
        # 2e-8: square roots of sums that cancel to about 1e-16
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=2e-8, msg=f"{name} changed")


def test_rotating_features_and_classifier_changes_nothing():
    features, targets, weight, bias = random_problem()
    logits = features @ weight.T + bias
    before = measure(features, targets, weight, bias, logits)
    compare(before, before, measure(features @ ROTATION, targets, weight @ ROTATION, bias, logits))


def test_scaling_changes_nothing_that_has_no_units():
    features, targets, weight, bias = random_problem()
    logits = features @ weight.T + bias
    before = measure(features, targets, weight, bias, logits)
    after = measure(30 * features, targets, 7 * weight, bias, logits)
    compare(before.keys() - WITH_UNITS, before, after)


def test_moving_all_features_changes_nothing_but_the_bias_duality():
    features, targets, weight, bias = random_problem()
    logits = features @ weight.T + bias
    before = measure(features, targets, weight, bias, logits)
    after = measure(features + torch.arange(6.0), targets, weight, bias, logits)
    compare(before.keys() - {"bias_duality_classes", "bias_duality_samples"}, before, after)


def test_an_invertible_linear_map_leaves_vci_alone():
    features, targets, *_ = random_problem()
    before, after = measure(features, targets), measure(features @ LINEAR, targets)
    compare(["vci"], before, after)
    for name in ("nc1_quotient", "nc1_pinv_over_k"):  # the pseudo-inverse keeps the span of the means, not its metric
        assert abs(before[name] / after[name] - 1) > 0.1


def test_with_as_many_directions_as_features_the_linear_map_leaves_the_pseudo_inverse_too():
    # tr(Sigma_W pinv(Sigma_B)) is invariant where Sigma_B is invertible on the space of the features: D = K - 1.
    features, targets, *_ = random_problem(sizes=(20, 9, 8, 7), width=3)
    before, after = measure(features, targets), measure(features @ LINEAR[:3, :3], targets)
    compare(["vci", "nc1_pinv_over_k", "nc1_from_moment"], before, after)


def test_vci_is_the_error_of_the_best_linear_map_onto_the_class_means():
    features, targets, *_ = random_problem(sizes=(15, 15, 15, 15))
    sums = nc.class_sums(features, targets, 4)
    total = torch.cov(features.T, correction=0)
    between = torch.cov(nc.class_means(sums).T, correction=0)
    expected = 1 - torch.trace(torch.linalg.solve(total, between)) / 3
    value = nc.variability_collapse_index(sums, nc.second_moment(features))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


def test_dead_features_change_nothing():
    features, targets, *_ = random_problem()
    wider = torch.cat([features, torch.zeros(len(features), 3)], dim=1)
    before = measure(features, targets)
    compare(before, before, measure(wider, targets))


def test_classes_without_samples_are_left_out_of_everything_but_nc0():
    features, targets, weight, bias = random_problem()
    order = torch.tensor([0, 2, 3, 5])  # classes 1 and 4 stay empty
    wide_weight, wide_bias = torch.randn(6, 6).double(), torch.randn(6).double()
    wide_weight[order], wide_bias[order] = weight, bias
    without = measure(features, targets, weight, bias)
    within = measure(features, order[targets], wide_weight, wide_bias)
    compare(without.keys() - {"nc0", "nc0_relative"}, without, within)


def test_nothing_is_undefined_loudly():
    nothing = measure(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), num_classes=3, weight=torch.randn(3, 3))
    one_class = measure(torch.randn(4, 3), torch.ones(4, dtype=torch.long), num_classes=3, weight=torch.randn(3, 3))
    for values in (nothing, one_class):
        undefined = {name for name, value in values.items() if value.isnan()}
        assert undefined >= values.keys() - {"nc0", "nc0_relative", "ncc_accuracy"}
        assert all(value.dtype == torch.float64 and value.shape == () for value in values.values())


def test_coinciding_class_means_give_nan_or_inf():
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(2, 1)
    values = measure(features, torch.tensor([0, 0, 1, 1]))
    assert values["nc1_pinv_over_k"].isnan()
    assert values["cdnv"].isinf()
    assert values["nc1_quotient"].isinf()


def test_features_that_are_not_finite_give_nan_and_no_exception():
    features, targets, weight, _ = random_problem()
    features[3, 2] = torch.inf
    values = measure(features, targets, weight)
    assert values["nc1_pinv_over_k"].isnan()
    assert values["vci"].isnan()


def test_two_classes_of_a_minority_that_collapsed_onto_one_point_are_one_direction_fewer():
    means = torch.tensor([[0.0, 0, 5], [3, 0, 5], [1, 2, 5], [1, 2, 5]]).double() / 3
    features = means.repeat_interleave(6, 0) + 0.01 * torch.randn(6, 3).double().repeat(4, 1)
    sums = nc.class_sums(features, torch.arange(4).repeat_interleave(6), 4)
    assert len(nc.between_class_spectrum(sums)) == 2
    assert nc.nc1_pinv_over_k(sums, nc.second_moment(features)) < 1e-3  # and not 1e27


def test_simplex_targets_are_left_out_where_no_simplex_fits():
    features, targets, weight, _ = random_problem(sizes=(9, 9, 9, 9), width=2)
    values = measure(features, targets, weight[:, :2])
    assert not values.keys() & {"nc2_etf_error", "nc2_equiangularity", "nc3_duality_error"}
    assert values["nc2_log_distance_mean"].isfinite()


def test_wrong_classifier_shapes_are_named():
    sums = nc.class_sums(torch.randn(4, 3), torch.arange(4) % 2, 2)
    with pytest.raises(ValueError, match=r"weight must be \(2, 3\)"):
        nc.collapse_measures(sums, weight=torch.randn(3, 2))
    with pytest.raises(ValueError, match="needs the weight"):
        nc.collapse_measures(sums, bias=torch.randn(2))
    with pytest.raises(ValueError, match=r"bias must be \(2,\)"):
        nc.collapse_measures(sums, weight=torch.randn(2, 3), bias=torch.randn(3))
    with pytest.raises(ValueError, match=r"basis must be \(2, subspace_dim, 3\)"):
        nc.collapse_measures(sums, basis=torch.randn(2, 3, 1))
    with pytest.raises(ValueError, match="'classes' or 'samples'"):
        nc.collapse_measures(sums, global_mean="median")
