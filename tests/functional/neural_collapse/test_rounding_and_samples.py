"""Measures beside the rounding of features and of sums, and what few samples make of them."""

import numpy
import pytest
import torch
from torch.nn.functional import layer_norm

from lightning_feat.functional import neural_collapse as nc
from lightning_feat.metrics import NeuralCollapse


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(features, targets):
    """Residuals (N, D) and centred class means (C, D), by the definition."""
    h, size = features.double(), int(targets.max()) + 1
    means = torch.stack([h[targets == c].mean(0) for c in range(size)])
    return h - means[targets], means - means.mean(0)


def nc1(features, targets):
    residuals, means = parts(features, targets)
    within, between = residuals.T @ residuals / len(residuals), means.T @ means / len(means)
    inverse = numpy.linalg.pinv(between.numpy(), rcond=1e-10, hermitian=True)
    return float((within * torch.from_numpy(inverse)).sum() / len(means))


def quotient(features, targets):
    residuals, means = parts(features, targets)
    return float(residuals.square().sum() / len(residuals) / means.square().sum(1).mean())


def both_passes(features, targets, **options):
    size = int(targets.max()) + 1
    metric = NeuralCollapse(size, features.shape[1], second_moment=True, within_scatter=True, **options)
    for part in (slice(0, 37), slice(37, None)):
        metric.update(features[part], targets[part])
    once = metric.compute()
    metric.start_second_pass()
    for part in (slice(0, 37), slice(37, None)):
        metric.update_second_pass(features[part], targets[part])
    return once, metric.compute()


def classes(spread, width=24, number=40, each=8):
    targets = torch.arange(number).repeat_interleave(each)
    return normal(number, width)[targets] + spread * normal(len(targets), width, seed=1), targets


@pytest.mark.parametrize("spread", [0.1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("behind", ["layer norm", "bottleneck", "nothing"])
def test_nc1_by_pseudo_inverse_and_vci_of_float32_features_are_the_definitions(spread, behind):
    if behind == "bottleneck":
        z, targets = classes(spread, width=6)
        features, full = z.float() @ normal(6, 24, seed=3).float(), 6
    else:
        h, targets = classes(spread)
        features, full = (layer_norm(h.float(), (24,)), 23) if behind == "layer norm" else (h.float(), 24)
    once, twice = both_passes(features, targets)
    right = nc1(features, targets)
    # The rounding of the features themselves, 6e-8, is part of a spread of 1e-6, in what is kept and what is not.
    torch.testing.assert_close(float(twice["nc1_pinv_over_k"]), right, rtol=1e-6 if spread > 1e-5 else 0.02, atol=0)
    # Raw second moments leave 1e-15 of the mean square, next to the spread within classes.
    torch.testing.assert_close(float(once["nc1_pinv_over_k"]), right, rtol=1e-6 + 1e-13 / spread**2, atol=0)
    residuals, means = parts(features, targets)
    keep = torch.linalg.svd(means, full_matrices=False)[2][:full].T
    w = (residuals @ keep).T @ (residuals @ keep) / len(residuals)
    b = (means @ keep).T @ (means @ keep) / len(means)
    vci = float(torch.trace(torch.linalg.solve(w + b, w)) / full)
    torch.testing.assert_close(float(twice["vci"]), vci, rtol=1e-4 if spread > 1e-5 else 0.05, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_second_pass_lifts_the_floor_of_quotient_cdnv_and_vci(offset):
    h, targets = classes(1e-9)
    once, twice = both_passes(h + offset, targets)
    assert twice["nc1_quotient"] < 1e-16
    assert twice["cdnv"] < 1e-16
    torch.testing.assert_close(float(twice["nc1_quotient"]), quotient(h + offset, targets), rtol=1e-6, atol=0)
    counts = torch.ones(40) * 8
    residuals, means = parts(h + offset, targets)
    variance = residuals.square().sum(1).reshape(40, 8).sum(1) / counts
    pairs = [(i, j) for i in range(40) for j in range(i)]
    cdnv = torch.stack([(variance[i] + variance[j]) / (2 * (means[i] - means[j]).square().sum()) for i, j in pairs])
    torch.testing.assert_close(twice["cdnv"], cdnv.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(twice["cdnv_worst_pair"], cdnv.max(), rtol=1e-6, atol=0)
    assert once["nc1_quotient"] < 1e-14 * (1 + offset) ** 2  # the floor that docstrings state


def test_soft_targets_lift_it_too():
    h, targets = classes(1e-6)
    soft = torch.nn.functional.one_hot(targets, 40).double()
    metric = NeuralCollapse(40, 24)
    metric.update(h, soft)
    metric.start_second_pass()
    metric.update_second_pass(h, soft)
    torch.testing.assert_close(float(metric.compute()["nc1_quotient"]), quotient(h, targets), rtol=1e-3, atol=0)


@pytest.mark.parametrize("samples", [60, 128, 129])
def test_vci_is_undefined_where_samples_span_as_many_directions_as_there_are_but_one(samples):
    features, targets = normal(samples, 128), torch.arange(samples) % 5
    metric = NeuralCollapse(5, 128, second_moment=True)
    metric.update(features.float(), targets)
    with pytest.warns(UserWarning, match=f"a linear probe on 128 features fits any {samples} samples"):
        assert metric.compute()["vci"].isnan()


def test_vci_of_few_samples_is_known_where_they_have_collapsed():
    targets = torch.arange(20) % 4
    _, twice = both_passes(normal(4, 64)[targets].float(), targets)
    assert 0 <= twice["vci"] < 1e-12


def test_no_spread_is_known_of_classes_of_one_sample():
    metric = NeuralCollapse(6, 4, second_moment=True)
    metric.update(normal(6, 4), torch.arange(6))
    with pytest.warns(UserWarning, match="6 samples of 6 classes, none with two"):
        values = metric.compute()
    undefined = {name for name, value in values.items() if value.isnan()}
    assert undefined >= {"nc1_quotient", "nc1_quotient_balanced", "cdnv", "cdnv_worst_pair", "nc1_pinv_over_k", "vci"}


@pytest.mark.parametrize("each", [4, 32])
def test_few_samples_of_a_class_shift_measures_as_the_docstring_says(each):
    number, width, spread = 50, 20, 1.5
    targets = torch.arange(number).repeat_interleave(each)
    means, found = normal(number, width), []
    for seed in range(20):
        features = means[targets] + spread * normal(len(targets), width, seed=100 + seed)
        sums = nc.class_sums(features, targets, number)
        moment = nc.second_moment(features)
        found.append(torch.stack([nc.nc1_quotient(sums), nc.variability_collapse_index(sums, moment)]))
    value = torch.stack(found).mean(0)
    centered = means - means.mean(0)
    q = float(width * spread**2 / centered.square().sum(1).mean())
    torch.testing.assert_close(float(value[0]), q * (1 - 1 / each) / (1 + q / each), rtol=0.02, atol=0)
    if each > 4:  # as it stands for many samples; in few, class means carry noise of their own
        between = torch.linalg.eigvalsh(centered.T @ centered / number)
        vci = float((spread**2 / (spread**2 + between)).mean())
        assert abs(float(value[1]) / vci - 1) < 0.1


def test_noise_comes_out_as_large_as_a_class_allows():
    sums = nc.class_sums(normal(1000, 50), torch.arange(1000) % 100, 100)  # ten of each class
    torch.testing.assert_close(float(nc.nc1_quotient(sums)), 9.0, rtol=0.05, atol=0)
    torch.testing.assert_close(float(nc.class_distance_normalized_variance(sums)), 4.5, rtol=0.1, atol=0)


def test_vci_of_noise_comes_out_as_the_docstring_says():
    targets, found = torch.arange(400) % 5, []
    for seed in range(10):
        features = normal(400, 100, seed=seed)
        found.append(nc.variability_collapse_index(nc.class_sums(features, targets, 5), nc.second_moment(features)))
    torch.testing.assert_close(float(torch.stack(found).mean()), 1 - 100 / 399, rtol=0.02, atol=0)


def test_a_nearly_constant_feature_is_not_blown_up():
    h = normal(200, 6)
    h[:, 2] = 5 + 1e-7 * normal(200, seed=4)  # a rounding or two of float32
    features, targets = h.float(), torch.arange(200) % 2
    found = nc.neco_subspace(nc.class_sums(features, targets, 2), nc.second_moment(features), 5)
    assert found.scale[2] == 1
    assert found.directions[:, 2].abs().max() < 1e-6


def test_a_head_of_dependent_rows_spans_no_more_in_float32():
    weight = normal(4, 9)
    weight[3] = weight[0] + weight[1]
    features = normal(50, 9, seed=2)
    torch.testing.assert_close(nc.nrc2(features, weight.float()), nc.nrc2(features, weight[:3].float()))


def test_duplicates_up_to_rounding_are_left_out_of_the_dimension():
    features = normal(40, 5)
    twice = torch.cat([features, features * (1 + 1e-7)]).float()
    assert nc.two_neighbor_dimension(twice).isnan()
    assert nc.two_neighbor_dimension(features.float()).isfinite()
